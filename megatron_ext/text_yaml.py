"""YAML whose scalars stay text until the type of the setting that they are for is known.

YAML 1.1 takes the sharing map 0_0_2_2 for the octal number 18, and `no` for false.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import ConfigError


class _TextLoader(yaml.BaseLoader):
    """Plain scalars stay text, except null; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal(key, "a list or mapping is no name of a setting")
            if key.value in seen:
                raise _refusal(key, f"{key.value} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NULL = "tag:yaml.org,2002:null"
_TextLoader.add_implicit_resolver(_NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor(_NULL, lambda loader, node: None)


def read_text_yaml(path: Path, name: str) -> Any:
    """What a file says, as `load_text_yaml`. Raises ConfigError, which calls the file `name`."""
    try:
        return load_text_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not a text in UTF-8: {error.reason} at byte {error.start}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{place} is not valid YAML: {getattr(error, 'problem', error)}.") from error


MOST_VALUES = 100_000
"""That a text may stand for. A few lines of aliases (*) can stand for more than any memory holds."""


def load_text_yaml(text: str) -> Any:
    """What `text` says, in dictionaries, lists, texts and None;
    nothing else is ever built. Raises yaml.YAMLError."""
    loader = _TextLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("lists or mappings in one another, too deep to be read") from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many values a node stands for, those behind aliases as often as they are referred to. `counts`:
    of nodes that were counted, 0 of those that this one is in."""
    if counts.setdefault(id(node), 0):
        return counts[id(node)]
    count = 1
    for part in _parts(node):
        if counts.get(id(part)) == 0:
            raise _refusal(part, "an alias (*) refers to what it is in")
        count += _count_values(part, counts)
        if count > MOST_VALUES:
            raise _refusal(part, f"it stands for more than {MOST_VALUES:,} values by its aliases (*)")
    counts[id(node)] = count
    return count


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (part for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _refusal(node: yaml.Node, reason: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
