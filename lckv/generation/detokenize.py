"""Text from tokens that come one by one: whole characters only,
and nothing of a text that ends the answer."""

from codecs import getincrementaldecoder
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol


class TokenTexts(Protocol):
    """What tokens are as text; see `TokenBytes`."""

    def bytes_of(self, token: int, *, first: bool = False) -> bytes | None:
        """What `token` adds to a text; None for special tokens."""
        ...

    def text_of(self, token: int, *, first: bool = False) -> str:
        """The text of a token, special ones too."""
        ...

    def special_token(self, name: str) -> int | None:
        """The number of the special token of that name."""
        ...

    def begins_text(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to `prompt` is the beginning of the text."""
        ...


class Detokenizer:
    """Turns tokens into text as they come: the characters of all their bytes. Bytes that are no character are
    replacement characters."""

    def __init__(self, texts: TokenTexts, before: Sequence[int] = ()) -> None:
        """`before`: tokens that the text goes on from."""
        self._texts = texts
        self._first = texts.begins_text(before)
        self._characters = getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that is certain now. A special token is left out."""
        content = self._texts.bytes_of(token, first=self._first)
        if content is None:
            return ""
        self._first = False
        return self._characters.decode(content)

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return self._characters.decode(b"", final=True)


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

    def __init__(
        self,
        texts: TokenTexts,
        stop: Sequence[str],
        before: Sequence[int],
        visible: Collection[int] = (),
    ) -> None:
        """`before`: the prompt; `visible`: special tokens whose names are part of the text."""
        self._texts, self._detokenizer, self._stop = texts, Detokenizer(texts, before), StopTexts(stop)
        self._visible = visible

    @property
    def stopped_by(self) -> str | None:
        """The stop text that was found."""
        return self._stop.stopped_by

    def add(self, token: int) -> str:
        """The text that is certain now."""
        if self._texts.bytes_of(token) is None:
            return self._stop.add(self._texts.text_of(token), shown=token in self._visible)
        return self._stop.add(self._detokenizer.add(token))

    def flush(self) -> str:
        """The rest, when no more tokens come; a stop text may still turn up in it."""
        text = self._stop.add(self._detokenizer.flush())
        return text if self._stop.stopped_by is not None else text + self._stop.flush()
