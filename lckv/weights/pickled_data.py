"""Pickles, read as data.

Python's unpickler makes objects: it calls what a pickle names, and gives the results whatever state the
pickle likes. A list of allowed names does not make that safe: an allowed class may take up any amount of
memory, and the state of one object may change others. Here nothing is imported and nothing is called.
Numbers, texts, lists and dictionaries become themselves; what a pickle would make by a call stays a note of
it, `Made`, which its reader understands or refuses.

Time and memory are bounded by the pickle's length: a result that, written out without repetitions, has more
parts than the pickle could hold, or that is nested too deep, is refused.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pickle import UnpicklingError
from pickletools import genops
from typing import Any

_ORDERED_DICTIONARY = "collections.OrderedDict"
_DEPTH = 64
_PARTS_PER_BYTE = 2
_PARTS_OF_ANY = 10_000
_SCALARS = (str, bytes, int, float, type(None))


class ForbiddenNameError(UnpicklingError):
    """A pickle names something that is not part of what is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"it names {name}")


@dataclass(frozen=True, eq=False)
class Name:
    """A class, a function or a value of a module, such as torch.float32, which was not looked up."""

    name: str


@dataclass(eq=False)
class Made:
    """What calling `name` with `arguments` makes."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    """What the object is to hold, where a pickle says so."""


@dataclass(frozen=True, eq=False)
class Persistent:
    """What a pickle refers to and does not hold."""

    reference: Any


def read_pickle(content: bytes, names: Collection[str]) -> Any:
    """The data in a pickle, in which only the given dotted names may occur.

    Ordered dictionaries are dictionaries. Every other object is a `Made`, every persistent one `Persistent`.

    Raises ForbiddenNameError for another name, UnpicklingError where the pickle is damaged, too deep, or
    larger than its length allows.
    """
    reader = _Reader(frozenset(names) | {_ORDERED_DICTIONARY})
    try:
        result = reader.read(content)
    except UnpicklingError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise UnpicklingError(f"the pickle is damaged: {error}") from error
    _check_extent(result, _PARTS_OF_ANY + _PARTS_PER_BYTE * len(content))
    return result


@dataclass
class _Reader:
    """The stack machine of pickles, without the instructions that have no use here."""

    names: frozenset[str]
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def read(self, content: bytes) -> Any:
        actions = _ACTIONS
        for opcode, argument, _ in genops(content):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _GIVEN:
                self.stack.append(argument)
            elif name in actions:
                actions[name](self, argument)
            else:
                raise UnpicklingError(f"the pickle has the instruction {name}, which none of torch has")
        raise UnpicklingError("the pickle has no end")

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count or (self.marks and len(self.stack) - count < self.marks[-1]):
            raise UnpicklingError("the pickle is damaged: it takes more than there is")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def put_name(self, name: str) -> None:
        if name not in self.names:
            raise ForbiddenNameError(name)
        self.stack.append(Name(name))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise UnpicklingError("the pickle is damaged: it appends to what is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise UnpicklingError("the pickle is damaged: it fills what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple takes as long as writing it out; `Made` is hashed as itself.
            if not isinstance(key, (*_SCALARS, Made)):
                raise UnpicklingError(f"a {type(key).__name__} is the key of a dictionary")
            target[key] = value

    def make(self) -> None:
        called, arguments = self.pop(2)
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise UnpicklingError("the pickle is damaged: it calls what is no function")
        plain = called.name == _ORDERED_DICTIONARY and not arguments
        self.stack.append({} if plain else Made(called.name, arguments))

    def set_state(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Made) and target.state is None:
            target.state = state
        elif not isinstance(target, dict):  # ordered dictionaries of weights carry versions, of no use here
            raise UnpicklingError("the pickle is damaged: it gives a state to what has none")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_GIVEN = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
    "SHORT_BINBYTES",
}  # fmt: skip
_ACTIONS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda reader, _: None,
    "FRAME": lambda reader, _: None,
    "MARK": lambda reader, _: reader.marks.append(len(reader.stack)),
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader.pop_to_mark())),
    "TUPLE1": lambda reader, _: reader.stack.append(tuple(reader.pop(1))),
    "TUPLE2": lambda reader, _: reader.stack.append(tuple(reader.pop(2))),
    "TUPLE3": lambda reader, _: reader.stack.append(tuple(reader.pop(3))),
    "APPEND": lambda reader, _: reader.append(reader.pop(1)),
    "APPENDS": lambda reader, _: reader.append(reader.pop_to_mark()),
    "SETITEM": lambda reader, _: reader.set_items(reader.pop(2)),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_to_mark()),
    "BINPUT": lambda reader, index: reader.remember(index),
    "LONG_BINPUT": lambda reader, index: reader.remember(index),
    "MEMOIZE": lambda reader, _: reader.remember(len(reader.memo)),
    "BINGET": lambda reader, index: reader.stack.append(reader.memo[index]),
    "LONG_BINGET": lambda reader, index: reader.stack.append(reader.memo[index]),
    "GLOBAL": lambda reader, pair: reader.put_name(pair.replace(" ", ".")),
    "STACK_GLOBAL": lambda reader, _: reader.put_name(".".join(reader.pop(2))),
    "REDUCE": lambda reader, _: reader.make(),
    "NEWOBJ": lambda reader, _: reader.make(),
    "BUILD": lambda reader, _: reader.set_state(),
    "BINPERSID": lambda reader, _: reader.stack.append(Persistent(*reader.pop(1))),
}


def _check_extent(result: Any, most: int) -> None:
    """Walks over everything, as often as it is referred to."""
    waiting = [(result, 0)]
    parts = 0
    while waiting:
        part, depth = waiting.pop()
        parts += 1
        if depth > _DEPTH or parts > most:
            raise UnpicklingError("it is nested too deep, or refers to its own parts too often")
        waiting.extend((inner, depth + 1) for inner in _inside(part))


def _inside(part: Any) -> Collection[Any]:
    if isinstance(part, dict):
        return [*part.keys(), *part.values()]
    if isinstance(part, list | tuple):
        return part
    if isinstance(part, Made):
        return (part.arguments, part.state)
    return (part.reference,) if isinstance(part, Persistent) else ()
