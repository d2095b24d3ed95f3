"""Text from tokens that come one by one: whole characters only,
and nothing of a text that ends the answer."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

_REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character, perhaps because the rest of it is yet to come."""

_LONGEST_WAIT = 8
"""Tokens that may be held back for the rest of a character, which has 4 bytes at most; more of them are no
character at all."""


_TAIL = 8
"""Tokens that the first text is decoded behind."""


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
        """`before`: tokens that the text goes on from."""
        self._tokenizer, self._given = tokenizer, before
        self._before: list[int] | None = None
        self._newest: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now. A special token ends what was held back, and is left out."""
        newest = [*self._newest, token]
        text = self._text(newest)
        if not text or text.endswith(_REPLACEMENT):
            if self.hidden(token):
                return self.flush()
            if text and len(newest) < _LONGEST_WAIT:
                self._newest = newest
                return ""
        self._before, self._newest = newest, []
        return text

    def hidden(self, token: int) -> str:
        """The text of a special token, which is no part of the text; empty for all others."""
        if self._tokenizer.decode([token], skip_special_tokens=True):
            return ""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        if not self._newest:
            return ""
        text = self._text(self._newest)
        self._before, self._newest = self._newest, []
        return text

    def _text(self, newest: list[int]) -> str:
        if self._before is None:
            shown = (token for token in reversed(self._given) if not self.hidden(token))
            self._before = list(islice(shown, _TAIL))[::-1]
        before, both = (
            self._tokenizer.decode(tokens, skip_special_tokens=True)
            for tokens in (self._before, self._before + newest)
        )
        return both[len(before) :]


class StopTexts:
    """Lets text through up to the first place where one of some texts is complete.

    The text of special tokens is not shown, but it may be part of a stop text. A stop text that has none of
    it is looked for in what is shown, any other in the whole.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._longest = max(map(len, self._texts), default=1) - 1
        self._held = ""
        self._shown: list[bool] = []  # for each character that is held
        self.stopped_by: str | None = None
        """The text that was found; nothing may be added after it."""

    def add(self, text: str, *, shown: bool = True) -> str:
        """The part of what is shown of `text`, and of what was held back before, that cannot belong to one of
        the texts, or is before it."""
        self._held += text
        self._shown += [shown] * len(text)
        whole = range(len(self._held))
        views = [whole] if all(self._shown) else [whole, [at for at in whole if self._shown[at]]]
        ends = [end for places in views for end in self._complete(places)]
        if ends:
            _, start, self.stopped_by = min(ends)
            return self._release(start, forget=True)
        return self._release(min(self._possible(places) for places in views))

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._release(len(self._held))

    def _complete(self, places: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """Each stop text that the characters at `places` have: where it ends and begins. Where several end
        together, the smallest tuple is the longest text."""
        text = "".join(self._held[at] for at in places)
        for stop in self._texts:
            start = text.find(stop)
            if start >= 0:
                yield places[start + len(stop) - 1], places[start], stop

    def _possible(self, places: Sequence[int]) -> int:
        """Where the first text begins that may yet become a stop text."""
        text = "".join(self._held[at] for at in places)
        for start in range(max(0, len(text) - self._longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._texts):
                return places[start]
        return len(self._held)

    def _release(self, end: int, *, forget: bool = False) -> str:
        """What is shown of the first `end` characters. `forget`: the others too."""
        released = "".join(self._held[at] for at in range(end) if self._shown[at])
        left = len(self._held) if forget else end
        self._held, self._shown = self._held[left:], self._shown[left:]
        return released


class AnswerText:
    """The text of one answer, from its tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], before: Sequence[int]) -> None:
        """`before`: the prompt."""
        self._detokenizer, self._stop = Detokenizer(tokenizer, before), StopTexts(stop)
        self._stopping = bool(stop)

    @property
    def stopped_by(self) -> str | None:
        """The stop text that was found."""
        return self._stop.stopped_by

    def add(self, token: int) -> str:
        """The text that is certain now."""
        hidden = self._detokenizer.hidden(token) if self._stopping else ""
        if not hidden:
            return self._stop.add(self._detokenizer.add(token))
        text = self._stop.add(self._detokenizer.flush())
        return text if self.stopped_by is not None else text + self._stop.add(hidden, shown=False)

    def flush(self) -> str:
        """The rest, when no more tokens come; a stop text may still turn up in it."""
        text = self._stop.add(self._detokenizer.flush())
        return text if self._stop.stopped_by is not None else text + self._stop.flush()
