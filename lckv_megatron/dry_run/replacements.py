"""Attributes that are replaced for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

_ABSENT = object()


class Replacement(NamedTuple):
    """`owner.name` is `value` for a while."""

    owner: Any
    name: str
    value: Any


@contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """All of them while the context is open; what was there before comes back, also after an error."""
    before = []
    try:
        for owner, name, value in replacements:
            before.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _ABSENT:  # it was inherited
                delattr(owner, name)
            else:
                setattr(owner, name, value)
