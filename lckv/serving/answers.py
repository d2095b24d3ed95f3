"""From the engine's events to OpenAI's objects: whole answers and streamed pieces of them,
for both kinds of requests."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lckv.generation.requests import TokenEvent

Kind = Literal["completion", "chat"]

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


TokenText = Callable[[int], str]
"""The text of a single token, as log-probabilities are reported."""


def logprobs_of(kind: Kind, events: list[TokenEvent], text_of: TokenText) -> dict[str, Any] | None:
    """The log-probabilities of some tokens; None where the request asked for none."""
    told = [event for event in events if event.token is not None and event.logprob is not None]
    if not told:
        return None
    if kind == "completion":
        return {
            "tokens": [text_of(event.token) for event in told if event.token is not None],
            "token_logprobs": [event.logprob for event in told],
            "top_logprobs": [
                {text_of(token): value for token, value in event.top_logprobs} for event in told
            ],
            "text_offset": [event.text_offset for event in told],
        }
    return {"content": [_chat_logprob(event, text_of) for event in told]}


def _chat_logprob(event: TokenEvent, text_of: TokenText) -> dict[str, Any]:
    def entry(token: int, value: float | None) -> dict[str, Any]:
        text = text_of(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    assert event.token is not None
    best = [entry(token, value) for token, value in event.top_logprobs]
    return {**entry(event.token, event.logprob), "top_logprobs": best}


def whole_choice(
    kind: Kind, index: int, events: list[TokenEvent], text_of: TokenText, prefix: str = ""
) -> dict[str, Any]:
    """One complete answer; `prefix` is the echoed prompt."""
    text = prefix + "".join(event.text for event in events)
    content = (
        {"text": text}
        if kind == "completion"
        else {"message": {"role": "assistant", "content": text, "refusal": None}}
    )
    reason = _FINISH_REASONS[events[-1].finish_reason or "stop"]
    return {
        "index": index,
        **content,
        "logprobs": logprobs_of(kind, events, text_of),
        "finish_reason": reason,
    }


def piece_choice(kind: Kind, index: int, event: TokenEvent, text_of: TokenText) -> dict[str, Any]:
    """One event of a streamed answer."""
    content: dict[str, Any] = (
        {"text": event.text} if kind == "completion" else {"delta": {"content": event.text}}
    )
    reason = None if event.finish_reason is None else _FINISH_REASONS[event.finish_reason]
    return {
        "index": index,
        **content,
        "logprobs": logprobs_of(kind, [event], text_of),
        "finish_reason": reason,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
