"""From YAML files and command-line options to a `RunConfig`, and back to plain dictionaries and YAML.

Every field of the configuration is one option, `--section.key VALUE`, explained by its docstring. Texts are never
guessed to be something else: YAML 1.1 takes the sharing map 0_0_2_2 for the octal number 18, so scalars stay text until
the type of their field is known.
"""

import argparse
import difflib
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar

import docstring_parser
import jsonargparse
import yaml

from megatron_ext.checkpointing.atomic import write_file
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError

_OWN_OPTIONS = ("config", "print_config", "help")
_Section = TypeVar("_Section")


@dataclass(frozen=True)
class _Setting:
    """One leaf of the configuration: where it is, its type, its default, its docstring and its section's docstring."""

    key: str
    type: Any
    default: object
    text: str
    group: str


def _settings_of(section: type, prefix: str, group: str) -> Iterator[_Setting]:
    described = docstring_parser.parse_from_object(section)
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in described.params}
    hints = typing.get_type_hints(section)
    for entry in fields(section):
        key, hint = prefix + entry.name, hints[entry.name]
        if is_dataclass(hint):
            summary = docstring_parser.parse_from_object(hint).short_description
            yield from _settings_of(typing.cast(type, hint), f"{key}.", f"{key}: {summary or ''}".rstrip(".:"))
        else:
            yield _Setting(key, hint, entry.default, texts[entry.name], group)


@cache
def _settings() -> dict[str, _Setting]:
    return {setting.key: setting for setting in _settings_of(RunConfig, "", "")}


@cache
def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        description="A run is described by YAML files, the later ones winning, and by options, which win over files.",
        usage="%(prog)s [--config FILE ...] [--print_config] [--section.key VALUE ...]",
        exit_on_error=False,
    )
    _add_own_options(parser)
    groups: dict[str, Any] = {}
    for setting in _settings().values():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        kind: dict[str, Any] = {"metavar": "TEXT|[TEXT,...]"} if _is_texts(setting.type) else {"type": setting.type}
        text = setting.text.replace("%", "%%")
        groups[setting.group].add_argument(f"--{setting.key}", default=setting.default, help=text, **kind)
    return parser


def _add_own_options(parser: argparse.ArgumentParser) -> None:
    absent = argparse.SUPPRESS
    parser.add_argument("--config", action="append", default=absent, metavar="FILE", help="YAML file; may be repeated.")
    parser.add_argument("--print_config", action="store_true", default=absent, help="Show the run as YAML and exit.")


def _texts(value: object) -> tuple[str, ...]:
    """The value of a field that is a list of texts, given as one text, as `[a, b]` or as a list; raises ValueError."""
    if isinstance(value, str):
        value = _load_yaml(value) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, list | tuple) or any(isinstance(entry, list | tuple | dict | NoneType) for entry in value):
        raise ValueError("not a list of texts")
    return tuple(str(entry) for entry in value)


def _is_texts(hint: Any) -> bool:
    return hint == tuple[str, ...]


class _TextLoader(yaml.BaseLoader):
    """YAML whose plain scalars stay text, except null; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NULL = "tag:yaml.org,2002:null"
_TextLoader.add_implicit_resolver(_NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor(_NULL, lambda loader, node: None)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_TextLoader)  # builds nothing but texts, lists and dictionaries


def _read_file(path: str | os.PathLike[str]) -> dict[str, object]:
    try:
        tree = _load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not a text in UTF-8: {error.reason} at byte {error.start}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"--config {path}{place} is not valid YAML: {getattr(error, 'problem', error)}.") from error
    return _checked(tree, f"{path}: ")


def _flatten(tree: object, prefix: str, unknown: list[str]) -> Iterator[tuple[str, object]]:
    """The leaves of nested sections as (dotted key, value); keys that no field has are appended to `unknown`."""
    if tree is None:  # a section whose entries are all commented out
        return
    if not isinstance(tree, Mapping):
        name = prefix.rstrip(".") or "the configuration"
        raise ConfigError(f"{name} is {tree!r}; it must be a mapping of names to values.")
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _settings():
            yield key, value
        elif any(known.startswith(f"{key}.") for known in _settings()):
            yield from _flatten(value, f"{key}.", unknown)
        else:
            unknown.append(key)


def _unknown_message(key: str) -> str:
    known = list(_settings())
    sections = {setting.rpartition(".")[0] for setting in known}
    same_name = [setting for setting in known if setting.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(key, [*known, *sections], n=1)
    return f"{key} is unknown; " + (f"did you mean {near[0]}?" if near else "--help shows every setting.")


def _describe(hint: Any) -> str:
    """The values that a field accepts, in words."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
    if _is_texts(hint):
        return "a list of texts, such as [a, b]"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return names.get(hint) or " or ".join(_describe(part) for part in typing.get_args(hint))


def _type_message(key: str, value: object) -> str:
    return f"{key} is {value!r}; it must be {_describe(_settings()[key].type)}."


def _checked(tree: object, origin: str) -> dict[str, object]:
    """Dotted keys with values of their fields' types; raises ConfigError naming all that is wrong, after `origin`."""
    problems: list[str] = []
    values: dict[str, object] = {}
    unknown: list[str] = []
    for key, value in _flatten(tree, "", unknown):
        hint = _settings()[key].type
        try:
            if _is_texts(hint):
                values[key] = _texts(value)
            elif isinstance(value, str) and str in (hint, *typing.get_args(hint)):
                values[key] = value  # as it is: the parser would take the text "null" for nothing
            elif value is None and NoneType not in typing.get_args(hint):
                raise ValueError("the parser would take it for not given")
            else:
                values[key] = _parser().parse_object({key: value}, defaults=False)[key]
        except (argparse.ArgumentError, ValueError, TypeError, yaml.YAMLError):
            problems.append(_type_message(key, value))
    problems += map(_unknown_message, unknown)
    if problems:
        raise ConfigError("\n".join(origin + problem for problem in problems))
    return values


def _build(section: type[_Section], values: Mapping[str, object], prefix: str = "") -> _Section:
    hints = typing.get_type_hints(section)
    arguments: dict[str, object] = {}
    for entry in fields(typing.cast(Any, section)):
        key, hint = prefix + entry.name, hints[entry.name]
        if is_dataclass(hint):
            arguments[entry.name] = _build(typing.cast(type, hint), values, f"{key}.")
        elif key in values:
            arguments[entry.name] = values[key]
    return section(**arguments)


def _parse_options(argv: Sequence[str]) -> dict[str, object]:
    """Dotted keys of the options in `argv`, with values of their fields' types; raises ConfigError."""
    names = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    unknown = [name for name in names if name not in _settings() and name not in _OWN_OPTIONS]
    if unknown:
        raise ConfigError("\n".join(map(_unknown_message, unknown)))
    try:
        given = vars(_parser().parse_args(list(argv), defaults=False).as_flat())
    except argparse.ArgumentError as error:
        raise ConfigError(_option_message(error, argv)) from error
    texts = {key: value for key, value in given.items() if key in _settings() and _is_texts(_settings()[key].type)}
    return given | _checked(texts, "")


def _option_message(error: argparse.ArgumentError, argv: Sequence[str]) -> str:
    found = re.search(r'Parser key "([^"]+)"', str(error))
    if found is None or found[1] not in _settings():
        return f"{error}; settings are given as --section.key VALUE."
    option = f"--{found[1]}"
    values = [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")]
    values += [value for word, value in pairwise(argv) if word == option]
    return _type_message(found[1], values[-1])


def parse_run_config(argv: Sequence[str] | None = None) -> RunConfig:
    """The run that `argv` (default: the program's arguments) and the YAML files named in it describe.

    `--help` and `--print_config` print and exit. A wrong option or file ends the program with status 2 and one message.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "-h" in argv or "--help" in argv:
        _parser().print_help()
        raise SystemExit(0)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_own_options(own)
    try:
        shown, options = own.parse_known_args(argv)
        values: dict[str, object] = {}
        for path in getattr(shown, "config", []):
            values |= _read_file(path)
        run = _build(RunConfig, values | _parse_options(options))
    except (ConfigError, argparse.ArgumentError) as error:
        exit_with(str(error))
    if hasattr(shown, "print_config"):
        sys.stdout.write(_to_yaml(run))
        raise SystemExit(0)
    return run


def exit_with(message: str) -> NoReturn:
    """End the program with status 2 and `message` on stderr, said by one process of a torchrun group only."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def config_to_dict(run: RunConfig) -> dict[str, Any]:
    """Sections as nested dictionaries of texts, numbers, booleans, lists and None: fit for JSON and YAML."""
    return asdict(run, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def config_from_dict(sections: Mapping[str, Any]) -> RunConfig:
    """The inverse of `config_to_dict`; fields left out have their defaults. Raises ConfigError naming all misfits."""
    return _build(RunConfig, _checked(sections, ""))


def _to_yaml(run: RunConfig) -> str:
    return yaml.safe_dump(config_to_dict(run), sort_keys=False, allow_unicode=True)


def save_config(run: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write `run` as YAML, in full or not at all; raises OSError, or ValueError where it would read back differently."""
    text = _to_yaml(run)
    if _build(RunConfig, _checked(_load_yaml(text), "")) != run:
        raise ValueError(f"{path} is not written: this configuration would be read back differently:\n{text}")
    write_file(Path(path), text.encode())
