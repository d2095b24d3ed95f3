"""YAML whose scalars stay text until the type of the setting that they are for is known.

YAML 1.1 takes the sharing map 0_0_2_2 for the octal number 18, and `no` for false.
"""

import re
from typing import Any

import yaml


class _TextLoader(yaml.BaseLoader):
    """Plain scalars stay text, except null; a key given twice is an error, and so are aliases: a few lines of
    them stand for more text than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "an alias (*) refers to other text; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or mapping is no name of a setting", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NULL = "tag:yaml.org,2002:null"
_TextLoader.add_implicit_resolver(_NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor(_NULL, lambda loader, node: None)


def load_text_yaml(text: str) -> Any:
    """What `text` says, in dictionaries, lists, texts and None;
    nothing else is ever built. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_TextLoader)
    except RecursionError:
        raise yaml.YAMLError("lists or mappings in one another, too deep to be read") from None
