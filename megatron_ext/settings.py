"""From a configuration, which is frozen dataclasses in frozen dataclasses, to its settings, and from values
back to it.

A setting is a field that is no dataclass itself, under a dotted key such as `train.seed`. A field may be a
choice of dataclasses, its variants: its metadata has a function "variants" that returns them by their names.
Then the setting `name` chooses, and the other settings of a variant exist only where it is chosen.
"""

import argparse
import difflib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache, partial
from types import NoneType
from typing import Any, Literal, TypeVar

import docstring_parser
import jsonargparse
import yaml

from lckv.reading import describe
from megatron_ext.errors import ConfigError
from megatron_ext.foreign_names import SETTING_OF
from megatron_ext.text_yaml import load_text_yaml

_ALIKE_KEYS, _ALIKE_NAMES = 0.6, 0.75
"""How alike, from 0 to 1, what is unknown must be to what may be meant."""

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class Setting:
    """One leaf of a configuration, as one variant has it."""

    key: str
    type: Any
    default: object
    text_of: Callable[[], str]
    group_of: Callable[[], str]
    needs: tuple[str, str] | None = None
    """The setting that chooses the variant, and its value that makes this one exist;
    None: it always exists."""

    @property
    def text(self) -> str:
        """Its docstring. Read from the source, which takes a second for all settings: when it is shown."""
        return self.text_of()

    @property
    def group(self) -> str:
        """What --help says above it: its section and what that is."""
        return self.group_of()


def variants_of(entry: Field[Any]) -> Mapping[str, type]:
    """The dataclasses that the field `entry` may be, by their names; empty where it is no choice."""
    return entry.metadata["variants"]() if "variants" in entry.metadata else {}


def settings_of(root: type) -> Mapping[str, Sequence[Setting]]:
    """The settings of a configuration by their keys.
    A key has several where several variants have a field of that name."""
    settings: dict[str, list[Setting]] = {}
    for setting in _walk(root, "", str, None):
        settings.setdefault(setting.key, []).append(setting)
    return settings


@cache
def _texts_of(section: type) -> Mapping[str, str]:
    """The docstrings of a dataclass's fields."""
    described = docstring_parser.parse_from_object(section)
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in described.params}


def _walk(
    section: type, prefix: str, group_of: Callable[[], str], needs: tuple[str, str] | None
) -> Iterator[Setting]:
    hints = typing.get_type_hints(section)
    for entry in fields(section):
        key, hint = prefix + entry.name, hints[entry.name]
        text_of = partial(_text_of, section, entry.name)
        if is_dataclass(hint):
            part = typing.cast(type, hint)
            yield from _walk(part, f"{key}.", partial(_title, key, part), needs)
        elif variants := variants_of(entry):
            yield _choice(key, entry, variants, text_of)
            for name, part in variants.items():
                yield from _walk(part, f"{key}.", partial("{} {}".format, key, name), (f"{key}.name", name))
        elif needs is None or key != needs[0]:
            yield Setting(key, hint, entry.default, text_of, group_of, needs)


def _text_of(section: type, name: str) -> str:
    return _texts_of(section)[name]


def _title(key: str, section: type) -> str:
    return f"{key}: {_summary(section)}".rstrip(".:")


def _choice(key: str, entry: Field[Any], variants: Mapping[str, type], text_of: Callable[[], str]) -> Setting:
    """The setting that chooses the variant of the field `entry`."""
    names: Any = Literal.__getitem__(tuple(variants))
    return Setting(
        f"{key}.name",
        names,
        _default_name(entry),
        lambda: " ".join(f"{name}: {_summary(part)}" for name, part in variants.items()),
        lambda: f"{key}: {text_of()}".rstrip("."),
    )


def _default_name(entry: Field[Any]) -> str:
    return typing.cast(Any, entry).default_factory().name


@cache
def _summary(section: type) -> str:
    """The first paragraph of a dataclass's docstring, in one line."""
    text = docstring_parser.parse_from_object(section).description or ""
    return " ".join(text.partition("\n\n")[0].split())


def describe_settings(root: type) -> str:
    """All settings with their types, defaults and docstrings,
    grouped by section and variant, as --help shows them."""
    groups: dict[str, list[Setting]] = {}
    for setting in _walk(root, "", str, None):
        groups.setdefault(setting.group, []).append(setting)
    return "\n".join(_describe_group(title, members) for title, members in groups.items())


def _describe_group(title: str, members: Iterable[Setting]) -> str:
    # A parser for each group: two variants may have a setting of the same key, one parser may not.
    parser = jsonargparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    group = parser.add_argument_group(title or None)
    for setting in members:
        kind: dict[str, Any] = (
            {"metavar": "TEXT|[TEXT,...]"} if is_texts(setting.type) else {"type": setting.type}
        )
        group.add_argument(f"--{setting.key}", default=setting.default, help=setting.text, **kind)
    return parser.format_help()


def read(root: type[_Section], sources: Iterable[tuple[str, object]]) -> _Section:
    """The configuration that `sources` describe, the later ones winning; what none of them gives has its
    default.

    A source is what its problems begin with, such as "run.yaml: ", and its values: sections as nested
    mappings, or dotted keys. Texts are read as values of their settings' types. Raises ConfigError, which
    names all that is wrong.
    """
    known = settings_of(typing.cast(type, root))
    problems: list[str] = []
    given: list[tuple[str, str, object]] = []
    for origin, tree in sources:
        for key, value in _leaves(tree, "", known):
            if key in known:
                given.append((origin, key, value))
            else:
                problems.append(origin + _stray_message(root, key, value))
    choosing = {
        setting.needs[0] for settings in known.values() for setting in settings if setting.needs is not None
    }
    chosen = {key: known[key][0].default for key in choosing}
    chosen |= {key: value for _, key, value in given if key in chosen}
    values: dict[str, object] = {}
    for origin, key, value in given:
        try:
            setting = _in_force(known, key, chosen)
            if setting is not None:
                values[key] = _cast(setting, value)
        except ConfigError as error:
            problems.append(f"{origin}{error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return _build(root, values)


def _leaves(tree: object, prefix: str, known: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """(dotted key, value) of what `tree` gives; also of keys that are unknown,
    and of values where a section belongs."""
    if tree is None:  # a section whose entries are all commented out
        return
    if not isinstance(tree, Mapping):
        yield prefix.rstrip("."), tree
        return
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if _settings_in(known, key):
            yield from _leaves(value, f"{key}.", known)
        else:
            yield key, value


def _settings_in(known: Iterable[str], section: str) -> list[str]:
    return [key for key in known if key.startswith(f"{section}.")]


def _stray_message(root: type, key: str, value: object) -> str:
    if key and not _settings_in(settings_of(root), key):
        return unknown_message(root, key)
    return f"{key or 'the configuration'} is {value!r}; it must be a mapping of names to values."


def unknown_message(root: type, key: str) -> str:
    """Says that `key` is no setting, and which one may be meant."""
    known = list(settings_of(root))
    if inside := _settings_in(known, key):
        return f"{key} is a section; its settings are {', '.join(inside)}."
    near = _nearest(known, key.replace("-", "_"))
    return f"{key} is unknown; " + (f"did you mean {near}?" if near else "--help shows every setting.")


def _nearest(known: Sequence[str], key: str) -> str | None:
    """The setting or section that may be meant: one of this name in another section, one of this foreign
    name, or one whose key or name is spelt alike; None where nothing is."""
    name = key.rpartition(".")[2].lower()
    same_name = [setting for setting in known if setting.rpartition(".")[2] == name]
    foreign = {alias: setting for alias, setting in SETTING_OF.items() if setting in known}
    if same_name or name in foreign:
        return same_name[0] if same_name else foreign[name]
    sections = {setting.rpartition(".")[0] for setting in known}
    spelt = {**{setting.rpartition(".")[2]: setting for setting in reversed(known)}, **foreign}
    of_key = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=_ALIKE_KEYS)
    of_name = difflib.get_close_matches(name, spelt, n=1, cutoff=_ALIKE_NAMES)
    if of_key and of_name and _likeness(key, of_key[0]) < _likeness(name, of_name[0]):
        return spelt[of_name[0]]
    return of_key[0] if of_key else spelt[of_name[0]] if of_name else None


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _in_force(
    known: Mapping[str, Sequence[Setting]], key: str, chosen: Mapping[str, object]
) -> Setting | None:
    """The setting of this key that exists under the chosen variants; None where an unknown variant is chosen,
    which is a problem of its own. Raises ConfigError where only other variants have it."""
    owners: list[str] = []
    choice = ""
    for setting in known[key]:
        if setting.needs is None:
            return setting
        choice, name = setting.needs
        if chosen[choice] == name:
            return setting
        owners.append(name)
    if chosen[choice] not in typing.get_args(known[choice][0].type):
        return None
    names = " or ".join(owners)
    raise ConfigError(
        f"{key} belongs to {choice.split('.')[-2]} {names}; {choice} is {chosen[choice]}: remove the former, "
        f"or set the latter to {names}."
    )


def is_texts(hint: Any) -> bool:
    """Whether a setting of this type is a list of texts."""
    return hint == tuple[str, ...]


def _cast(setting: Setting, value: object) -> object:
    """`value` as a value of the setting's type; raises ConfigError."""
    hint = setting.type
    try:
        if is_texts(hint) or (isinstance(value, list | tuple) and tuple[str, ...] in typing.get_args(hint)):
            return _texts(value)
        if type(value) in (bool, int, float) and type(value) is hint:
            return value  # as a parser of this type would have it, which takes milliseconds to make
        if isinstance(value, str) and str in (hint, *typing.get_args(hint)):
            return value  # as it is: the parser would take the text "null" for nothing
        if value is None and NoneType not in typing.get_args(hint):
            raise ValueError("the parser would take it for not given")
        return _parser_of(hint).parse_object({"value": value}, defaults=False)["value"]
    except (argparse.ArgumentError, ValueError, TypeError, yaml.YAMLError):
        needed = f"{_describe(hint)}{_suggestion(hint, value)}"
        raise ConfigError(f"{setting.key} is {value!r}; it must be {needed}") from None


@cache
def _parser_of(hint: Any) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _texts(value: object) -> tuple[str, ...]:
    """The value of a setting that is a list of texts, given as one text,
    as `[a, b]` or as a list; raises ValueError."""
    if isinstance(value, str):
        value = load_text_yaml(value) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, list | tuple) or any(
        isinstance(entry, list | tuple | dict | NoneType) for entry in value
    ):
        raise ValueError("not a list of texts")
    return tuple(str(entry) for entry in value)


def _suggestion(hint: Any, value: object) -> str:
    names = [str(name) for name in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else "."


def _describe(hint: Any) -> str:
    """The values that a setting accepts, in words."""
    return "a list of texts, such as [a, b]" if is_texts(hint) else describe(hint)


def _build(section: type[_Section], values: Mapping[str, object], prefix: str = "") -> _Section:
    hints = typing.get_type_hints(section)
    arguments: dict[str, object] = {}
    for entry in fields(typing.cast(Any, section)):
        key, hint = prefix + entry.name, hints[entry.name]
        if variants := variants_of(entry):
            hint = variants[typing.cast(str, values.get(f"{key}.name", _default_name(entry)))]
        if is_dataclass(hint):
            arguments[entry.name] = _build(typing.cast(type, hint), values, f"{key}.")
        elif key in values:
            arguments[entry.name] = values[key]
    return section(**arguments)
