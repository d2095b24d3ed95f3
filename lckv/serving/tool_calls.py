"""Calls of functions in the text of an answer, found while it comes."""

import json
import re
import secrets
import string
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from lckv.serving.tool_formats import ToolFormat

_BETWEEN = re.compile(r"[\s;,]*")
"""What may stand between two calls behind one mark."""


class ToolCall(NamedTuple):
    """One call."""

    call_id: str
    name: str
    arguments: str
    """A JSON object."""

    def as_json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class Read(NamedTuple):
    """What is certain of an answer now and was not before."""

    text: str
    calls: list[ToolCall]


class CallReader:
    """Of one answer. What looks like a call and is none remains text. White space beside calls is left
    out."""

    def __init__(self, tool_format: ToolFormat, names: Collection[str], *, parallel: bool) -> None:
        """`names`: of the functions that may be called. Not `parallel`: what comes after the first call is
        left out."""
        self._format, self._names, self._parallel = tool_format, names, parallel
        self._held = ""
        self._opened: str | None = None  # white space and the mark before what is held; None: it is text
        self._begun = False  # whether there was text
        self.count = 0
        """Calls so far."""

    def add(self, text: str, *, last: bool = False) -> Read:
        """The answer's next text; `last`: no more comes."""
        self._held += text
        shown, calls = "", list[ToolCall]()
        while self._parallel or not self.count:
            step = self._inside(last) if self._opened is not None else self._outside(last)
            if step is None:
                break
            shown += step.text
            new = step.calls if self._parallel else step.calls[:1]
            calls += new
            self.count += len(new)
        return Read(shown, calls)

    def _outside(self, last: bool) -> Read | None:
        """Text up to the next mark; None when no more is certain."""
        mark, held = self._format.opens, self._held
        at = held.find(mark)
        if self._format.bare and not self._begun and (body := held.lstrip()).startswith("{"):
            self._held, self._opened = body, held[: len(held) - len(body)]
            return Read("", [])
        if at >= 0:
            text = held[:at].rstrip()
            self._held, self._opened = held[at + len(mark) :], held[len(text) : at] + mark
            return Read(self._text(text), [])
        certain = held if last else held[: _before_prefix(held, mark)].rstrip()
        self._held = held[len(certain) :]
        if last and self.count and certain.isspace():
            return None
        return Read(self._text(certain), []) if certain else None

    def _inside(self, last: bool) -> Read | None:
        """The calls behind a mark, when they are complete."""
        assert self._opened is not None
        closes = self._format.closes
        at = -1 if closes is None else self._held.find(closes)
        if at < 0 and not last:
            return None
        body, behind = self._held, ""
        if closes is not None and at >= 0:
            body, behind = self._held[:at], self._held[at + len(closes) :]
        calls = self._calls(body)
        whole = self._opened + self._held[: len(self._held) - len(behind)]
        self._held, self._opened = behind, None
        if calls is None:
            self._begun = True
            return Read(whole, [])
        return Read("", calls)

    def _text(self, text: str) -> str:
        self._begun |= bool(text.strip())
        return text

    def _calls(self, body: str) -> list[ToolCall] | None:
        """None if it is not calls, and nothing but calls."""
        try:
            made = [self._call(value) for value in _values(body)]
        except (ValueError, RecursionError):
            return None
        calls = [call for call in made if call is not None]
        return calls if calls and len(calls) == len(made) else None

    def _call(self, value: Any) -> ToolCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = value.get(self._format.arguments, {})
        if not isinstance(arguments, dict):
            return None
        return ToolCall(self._call_id(), name, json.dumps(arguments, ensure_ascii=False))

    def _call_id(self) -> str:
        letters = string.ascii_letters + string.digits
        if self._format.id_letters is not None:
            return "".join(secrets.choice(letters) for _ in range(self._format.id_letters))
        return "call_" + "".join(secrets.choice(letters) for _ in range(24))


def _values(body: str) -> Iterator[Any]:
    """JSON values one behind the other; those of lists one by one."""
    decoder, at = json.JSONDecoder(), 0
    while (at := _BETWEEN.match(body, at).end()) < len(body):  # type: ignore[union-attr]  # it always matches
        value, at = decoder.raw_decode(body, at)
        yield from value if isinstance(value, list) else [value]


def _before_prefix(text: str, mark: str) -> int:
    """Where the part of a text begins that may yet become the mark."""
    for start in range(max(0, len(text) - len(mark) + 1), len(text)):
        if mark.startswith(text[start:]):
            return start
    return len(text)
