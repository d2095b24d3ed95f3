"""The fields of a client's JSON objects: each is read, or refused under the name that the client gave it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lckv.serving.errors import ApiError, shown


class Kind(NamedTuple):
    """What a field may hold."""

    words: str
    fits: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))
NUMBER = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))


class Fields:
    """What is left to read of an object. Null is as if a field were not there."""

    def __init__(self, content: Any, path: str = "") -> None:
        """`path`: of the object in the request. Raises ApiError where it is none."""
        check(content, OBJECT, path or "The body")
        self._left, self._path = dict(content), path

    def path(self, name: str) -> str:
        """A field's name in the request."""
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str, kind: Kind | None = None, default: Any = None) -> Any:
        """A field's value. Raises ApiError if it is of another kind."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        return value if kind is None else check(value, kind, self.path(name))

    def need(self, name: str, kind: Kind) -> Any:
        """The value of a field that must be there."""
        value = self.take(name, kind)
        if value is None:
            path = self.path(name)
            raise ApiError(400, f"{path} is missing; it must be {kind.words}.", param=path)
        return value

    def refuse_others(self, accepted: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises ApiError for a field that was not read, unless it has one of the values that mean what is
        done anyway."""
        for name, value in self._left.items():
            if name not in accepted:
                path = self.path(name)
                raise ApiError(400, f"{path}: there is no such field.", param=path)
            if value is not None and not any(_same(value, harmless) for harmless in accepted[name]):
                self._refuse_value(name, value, accepted[name])

    def _refuse_value(self, name: str, value: Any, accepted: tuple[Any, ...]) -> None:
        path = self.path(name)
        values = " and ".join([*map(repr, accepted), "null"] if accepted else ["null"])
        raise ApiError(400, f"{path} is {shown(value)}; this server only supports {values}.", param=path)


def check(value: Any, kind: Kind, path: str) -> Any:
    """`value`. Raises ApiError if it is of another kind."""
    if not kind.fits(value):
        raise ApiError(400, f"{path} is {shown(value)}; it must be {kind.words}.", param=path)
    return value


def _same(value: Any, harmless: Any) -> bool:
    """Equal, and not only because true is 1 in Python."""
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
