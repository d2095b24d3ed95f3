"""Log-probabilities of tokens as OpenAI's clients read them."""

from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from lckv.generation.detokenize import TokenTexts
from lckv.generation.requests import TokenEvent
from lckv.generation.sampling import Choice

Kind = Literal["completion", "chat"]

_LEAST = -9999.0
"""What OpenAI writes for tokens that are (nearly) impossible; minus infinity is no JSON."""


class _Token(NamedTuple):
    number: int
    text: str
    content: bytes | None
    logprob: float | None
    """None for the first token of a text, which follows nothing."""

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

    def by_text(self) -> dict[str, float] | None:
        """The most probable tokens as completions have them, by their texts; where two have the same, the
        less probable one by its number."""
        if self.own.logprob is None:
            return None
        named: dict[str, float] = {}
        for token in self.best:
            assert token.logprob is not None
            named[f"token_id:{token.number}" if token.text in named else token.text] = token.logprob
        return named


class _Text:
    """A text that tokens make: where each begins in it."""

    def __init__(self, texts: TokenTexts, *, first: bool, characters: int = 0) -> None:
        """`first`: the next token begins the text; `characters`: before it."""
        self._texts, self._first, self.characters = texts, first, characters
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def add(self, choice: Choice) -> _Entry:
        """The next token. Special tokens add nothing."""
        own = self._token(choice.token, choice.logprob)
        best = [self._token(token, logprob) for token, logprob in choice.top_logprobs]
        entry = _Entry(own, best, self.characters)
        if own.content is not None:
            self._first = False
            self.characters += len(self._decoder.decode(own.content))
        return entry

    def _token(self, token: int, logprob: float | None) -> _Token:
        text = self._texts.text_of(token, first=self._first)
        content = self._texts.bytes_of(token, first=self._first)
        return _Token(token, text, content, None if logprob is None else max(logprob, _LEAST))


class TokenLogprobs:
    """Of one answer, in pieces or at once: an entry for each of its tokens. Together their bytes are the
    answer's text, and behind it that of the stop text. Special tokens have no bytes."""

    def __init__(
        self, kind: Kind, texts: TokenTexts, prompt: Sequence[int], echoed: str | None = None
    ) -> None:
        """`echoed`: the prompt's text, where entries for its tokens come first."""
        self._kind, self._texts, self._prompt, self._echoed = kind, texts, prompt, echoed
        self._answer = _Text(texts, first=texts.begins_text(prompt), characters=len(echoed or ""))

    def of(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """Of the answer's next events; None where the request asked for none."""
        entries = [entry for event in events for entry in self._entries(event)]
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

    def _entries(self, event: TokenEvent) -> Iterator[_Entry]:
        if self._echoed is not None and event.prompt_logprobs is not None:
            yield from self._of_prompt(self._echoed, event.prompt_logprobs)
        if event.token is not None and event.logprob is not None:
            yield self._answer.add(Choice(event.token, event.logprob, event.top_logprobs))

    def _of_prompt(self, echoed: str, following: Sequence[Choice]) -> Iterator[_Entry]:
        """The first token follows nothing."""
        text = _Text(self._texts, first=True)
        for choice in (Choice(self._prompt[0]), *following):
            entry = text.add(choice)
            if entry.own.content is None and echoed.startswith(entry.own.text, entry.offset):
                text.characters += len(entry.own.text)  # a special token that the prompt itself has
            yield entry._replace(offset=min(entry.offset, len(echoed)))
