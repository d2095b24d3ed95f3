"""Text from tokens that come one by one: whole characters only,
and nothing of a text that ends the answer."""

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character, perhaps because the rest of it is yet to come."""

_LONGEST_WAIT = 8
"""Tokens that may be held back for the rest of a character, which has 4 bytes at most; more of them are no
character at all."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer (those of transformers have it)."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of some tokens."""
        ...


class Detokenizer:
    """Turns tokens into text as they come.

    Decoders treat the beginning of a text in their own way (spaces), so the newest tokens are decoded behind
    those before them, and what these give alone is taken off.
    The work per token does not depend on how many there were.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """`before`: tokens that the text goes on from; a few are enough."""
        self._tokenizer = tokenizer
        self._before = list(before)
        self._newest: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._newest.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._newest) < _LONGEST_WAIT:
            return ""
        self._before, self._newest = self._newest, []
        return text

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._text() if self._newest else ""
        self._before, self._newest = self._newest, []
        return text

    def _text(self) -> str:
        before, both = (
            self._tokenizer.decode(tokens, skip_special_tokens=True)
            for tokens in (self._before, self._before + self._newest)
        )
        return both[len(before) :]


class StopTexts:
    """Lets text through up to the first place where one of some texts is complete."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.stopped_by: str | None = None
        """The text that was found; nothing may be added after it."""

    def add(self, text: str) -> str:
        """The part of `text`, and of what was held back before, that cannot belong
        to one of the texts, or is before it."""
        held = self._held + text
        ends = [(held.find(stop) + len(stop), -len(stop), stop) for stop in self._texts if stop in held]
        if ends:
            end, length, self.stopped_by = min(ends)
            self._held = ""
            return held[: end + length]
        longest = max(map(len, self._texts), default=1) - 1
        for start in range(max(0, len(held) - longest), len(held)):
            if any(stop.startswith(held[start:]) for stop in self._texts):
                self._held = held[start:]
                return held[:start]
        self._held = ""
        return held

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of one answer, from its tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], before: Sequence[int]) -> None:
        """`before`: the prompt's newest tokens."""
        self._detokenizer, self._stop = Detokenizer(tokenizer, before), StopTexts(stop)

    @property
    def stopped_by(self) -> str | None:
        """The stop text that was found."""
        return self._stop.stopped_by

    def add(self, token: int) -> str:
        """The text that is certain now."""
        return self._stop.add(self._detokenizer.add(token))

    def flush(self) -> str:
        """The rest, when no more tokens come; a stop text may still turn up in it."""
        text = self._stop.add(self._detokenizer.flush())
        return text if self._stop.stopped_by is not None else text + self._stop.flush()
