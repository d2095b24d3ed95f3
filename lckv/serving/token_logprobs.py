"""Log-probabilities of tokens as OpenAI's clients read them."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from lckv.generation.detokenize import TokenTexts
from lckv.generation.requests import TokenEvent

Kind = Literal["completion", "chat"]

_LEAST = -9999.0
"""What OpenAI writes for tokens that are (nearly) impossible; minus infinity is no JSON."""


class _Token(NamedTuple):
    number: int
    text: str
    content: bytes | None
    logprob: float

    def chat(self) -> dict[str, Any]:
        """As chats have it."""
        content = None if self.content is None else list(self.content)
        return {"token": self.text, "logprob": self.logprob, "bytes": content}


class _Entry(NamedTuple):
    own: _Token
    best: list[_Token]
    offset: int
    """Characters of the text before it."""

    def chat(self) -> dict[str, Any]:
        """As chats have it."""
        return {**self.own.chat(), "top_logprobs": [token.chat() for token in self.best]}

    def by_text(self) -> dict[str, float]:
        """The most probable tokens as completions have them, by their texts; where two have the same, the
        less probable one by its number."""
        named: dict[str, float] = {}
        for token in self.best:
            named[f"token_id:{token.number}" if token.text in named else token.text] = token.logprob
        return named


class TokenLogprobs:
    """Of one answer, in pieces or at once: an entry for each of its tokens. Together their bytes are the
    answer's text, and behind it that of the stop text. Special tokens have no bytes."""

    def __init__(self, kind: Kind, texts: TokenTexts, prompt: Sequence[int]) -> None:
        self._kind, self._texts = kind, texts
        self._first = texts.begins_text(prompt)
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def of(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """Of the answer's next events; None where the request asked for none."""
        entries = [
            self._entry(event) for event in events if event.token is not None and event.logprob is not None
        ]
        if not entries:
            return None
        if self._kind == "chat":
            return {"content": [entry.chat() for entry in entries]}
        return {
            "tokens": [entry.own.text for entry in entries],
            "token_logprobs": [entry.own.logprob for entry in entries],
            "top_logprobs": [entry.by_text() for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _entry(self, event: TokenEvent) -> _Entry:
        assert event.token is not None and event.logprob is not None
        own = self._token(event.token, event.logprob)
        best = [self._token(token, logprob) for token, logprob in event.top_logprobs]
        entry = _Entry(own, best, self._characters)
        if own.content is not None:
            self._first = False
            self._characters += len(self._decoder.decode(own.content))
        return entry

    def _token(self, token: int, logprob: float) -> _Token:
        text = self._texts.text_of(token, first=self._first)
        return _Token(token, text, self._texts.bytes_of(token, first=self._first), max(logprob, _LEAST))
