"""Frozen dataclasses from the content of JSON files: types are checked, nothing is guessed.

A field is a number, a text, true or false, one of several values (`Literal`), null (`X | None`), a list
(`tuple[X, ...]`), or a dataclass, for which the file holds an object. A field whose metadata has `variants`,
a function that gives dataclasses by name, holds the one whose name the object gives as its `name`.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from lckv.errors import ModelError

_Kind = TypeVar("_Kind")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def read(kind: type[_Kind], content: object, name: str = "") -> _Kind:
    """The dataclass `kind` from `content`, an object of its fields; those left out have their defaults.

    `name` is what messages call the content, such as "compression"; then its fields are "compression.FIELD".

    Raises ModelError that names every field that is unknown, missing or of another type.
    """
    problems = list(_object_problems(kind, content, name))
    if problems:
        raise ModelError("\n".join(problems))
    return cast(_Kind, _build(kind, content))


def describe(hint: Any) -> str:
    """The values of a type, in words."""
    if hint in _WORDS:
        return _WORDS[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list of numbers" if get_args(hint)[0] is float else "a list"
    return " or ".join(describe(part) for part in get_args(hint))


def is_of_kind(value: object, kind: type) -> bool:
    """Whether a JSON value is an integer, a number, a text or true or false. A truth value is no integer, an
    integer is a number."""
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def fits(hint: Any, value: object) -> bool:
    """Whether a JSON value is one of the type `hint`."""
    if hint in _WORDS:
        return is_of_kind(value, hint)
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(fits(get_args(hint)[0], part) for part in value)
    return any(fits(part, value) for part in get_args(hint))


def unknown_field(key: str, known: Iterable[str]) -> str:
    """Says that the field `key`, of an object with the fields `known`, does not exist, and which is meant."""
    prefix, dot, last = key.rpartition(".")
    names = list(known)
    near = difflib.get_close_matches(last, names, n=1)
    way_out = f"did you mean {prefix}{dot}{near[0]}?" if near else f"the fields are {', '.join(names)}."
    return f"{key} is unknown; {way_out}"


def _object_problems(kind: type, content: object, key: str) -> Iterator[str]:
    if isinstance(content, kind):
        return
    known = {entry.name: entry for entry in fields(cast(Any, kind))}
    if not isinstance(content, Mapping):
        named = key or "the content"
        yield f"{named} is {content!r}; it must be an object with the fields {', '.join(known)}."
        return
    prefix = f"{key}." if key else ""
    hints = get_type_hints(kind)
    for name, value in content.items():
        if name in known:
            yield from _field_problems(known[name], hints[name], value, prefix + name)
        else:
            yield unknown_field(f"{prefix}{name}", known)
    for name, entry in known.items():
        if name not in content and entry.default is MISSING and entry.default_factory is MISSING:
            yield f"{prefix}{name} is missing; it has no default."


def _field_problems(entry: Field[Any], hint: Any, value: object, key: str) -> Iterator[str]:
    variants = _variants(entry)
    if variants:
        yield from _variant_problems(variants, value, key)
    elif is_dataclass(hint):
        yield from _object_problems(cast(type, hint), value, key)
    elif not fits(hint, value):
        yield f"{key} is {value!r}; it must be {describe(hint)}."


def _variants(entry: Field[Any]) -> Mapping[str, type]:
    choices: Callable[[], Mapping[str, type]] | None = entry.metadata.get("variants")
    return {} if choices is None else choices()


def _variant_problems(variants: Mapping[str, type], value: object, key: str) -> Iterator[str]:
    if value is None or isinstance(value, tuple(variants.values())):
        return
    if not isinstance(value, Mapping):
        yield f"{key} is {value!r}; it must be an object with a name, one of {', '.join(variants)}."
        return
    name = value.get("name")
    if not isinstance(name, str) or name not in variants:
        yield f"{key}.name is {name!r}; it must be one of {', '.join(variants)}."
        return
    yield from _object_problems(variants[name], value, key)


def _build(kind: type, content: object) -> object:
    """The dataclass from an object without problems."""
    if isinstance(content, kind):
        return content
    hints = get_type_hints(kind)
    given = cast(Mapping[str, Any], content)
    values: dict[str, object] = {}
    for entry in fields(cast(Any, kind)):
        if entry.name not in given:
            continue
        value, hint = given[entry.name], hints[entry.name]
        if variants := _variants(entry):
            if isinstance(value, Mapping):
                values[entry.name] = _build(variants[value["name"]], value)
            elif value is not None:  # null: the default
                values[entry.name] = value
        elif is_dataclass(hint):
            values[entry.name] = _build(cast(type, hint), value)
        else:
            values[entry.name] = _as_type(hint, value)
    return kind(**values)


def _as_type(hint: Any, value: object) -> object:
    """A value that fits, as Python has it: an integer where a number is wanted is one, a list is a tuple."""
    if isinstance(value, list):
        return tuple(value)
    wants_number = float in (hint, *get_args(hint)) and int not in get_args(hint)
    return float(value) if wants_number and isinstance(value, int) else value
