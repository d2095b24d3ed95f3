"""From the engine's events to OpenAI's objects: whole answers and streamed pieces of them,
for both kinds of requests."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lckv.generation.requests import TokenEvent
from lckv.serving.token_logprobs import Kind, TokenLogprobs

_OBJECTS = {
    ("completion", False): "text_completion",
    ("completion", True): "text_completion",
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
}
_FINISH_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "error"}


@dataclass(frozen=True)
class Header:
    """What all pieces of one answer have in common."""

    kind: Kind
    answer_id: str
    request_id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, piece: bool, **more: Any) -> dict[str, Any]:
        """An answer, or a streamed piece of it."""
        return {
            "id": self.answer_id,
            "object": _OBJECTS[self.kind, piece],
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def whole_choice(
    kind: Kind, index: int, events: Sequence[TokenEvent], logprobs: TokenLogprobs, prefix: str
) -> dict[str, Any]:
    """One complete answer; `prefix` is the echoed prompt."""
    text = prefix + "".join(event.text for event in events)
    content = (
        {"text": text}
        if kind == "completion"
        else {"message": {"role": "assistant", "content": text, "refusal": None}}
    )
    return _choice(index, content, logprobs.of(events), events[-1].finish_reason or "stop")


def piece_choice(
    kind: Kind, index: int, event: TokenEvent, logprobs: TokenLogprobs, prefix: str
) -> dict[str, Any]:
    """One event of a streamed answer; `prefix` comes before its text: the echoed prompt, or nothing."""
    text = prefix + event.text
    content: dict[str, Any] = {"text": text} if kind == "completion" else {"delta": {"content": text}}
    return _choice(index, content, logprobs.of([event]), event.finish_reason)


def opening_choice(index: int) -> dict[str, Any]:
    """What a streamed answer to a chat begins with."""
    return _choice(index, {"delta": {"role": "assistant", "content": ""}}, None, None)


def _choice(
    index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    finish_reason = None if reason is None else _FINISH_REASONS[reason]
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
