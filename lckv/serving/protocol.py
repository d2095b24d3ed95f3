"""What a client may ask for: the requests of OpenAI's HTTP interface, and what they mean to the engine.

A field that is not listed is refused with its name, and so is a value that this server cannot honour: nothing
is ignored silently.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lckv.generation.sampling import SamplingParams

_ONLY_VALUE: dict[str, Any] = {
    "best_of": 1,
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "suffix": "",
    "tools": [],
    "response_format": {"type": "text"},
}
"""Fields that clients send, of which only this value (or none) is supported."""


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    """Send one more event at the end, with the numbers of tokens."""


class GenerationRequest(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    """None, 0 and -1: all tokens."""

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    user: str | None = None
    """Accepted, and of no effect: nothing is stored."""

    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def unsupported(self) -> str | None:
        """What of the request cannot be honoured, as a sentence; None if nothing."""
        for name, only in _ONLY_VALUE.items():
            value = getattr(self, name, None)
            if value is not None and value != only:
                return f"{name} is {value!r}; this server only supports {only!r}."
        if self.stream_options is not None and not self.stream:
            return "stream_options is given, but stream is false."
        return None

    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, *, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        """For the engine."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=None if self.top_k in (0, -1) else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            max_new_tokens=max_new_tokens,
            stop=self.stops(),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    """One text or list of token ids, or several of either."""

    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Always several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    """Text, or parts of it: [{"type": "text", "text": ...}, ...]."""
    name: str | None = None

    def text(self) -> str:
        """The content as one text. Raises ValueError for parts that are no text."""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"messages: a part of type {part.get('type')!r}; only text is supported.")
        return "".join(part["text"] for part in self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def conversation(self) -> Sequence[Mapping[str, str]]:
        """For the tokenizer's chat template."""
        return [{"role": message.role, "content": message.text()} for message in self.messages]
