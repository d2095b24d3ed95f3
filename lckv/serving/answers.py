"""From the engine's events to OpenAI's objects: whole answers and streamed pieces of them,
for both kinds of requests."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lckv.generation.requests import TokenEvent
from lckv.serving.token_logprobs import Kind, TokenLogprobs
from lckv.serving.tool_calls import CallReader

_OBJECTS = {
    ("completion", False): "text_completion",
    ("completion", True): "text_completion",
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
}
_FINISH_REASONS = {
    "tool_calls": "tool_calls",
    "stop": "stop",
    "length": "length",
    "cancelled": "stop",
    "error": "error",
}


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
    kind: Kind,
    index: int,
    events: Sequence[TokenEvent],
    logprobs: TokenLogprobs,
    prefix: str,
    calls: CallReader | None = None,
) -> dict[str, Any]:
    """One complete answer; `prefix` is the echoed prompt. `calls`: finds calls of functions in it."""
    text = prefix + "".join(event.text for event in events)
    reason = events[-1].finish_reason or "stop"
    if kind == "completion":
        return _choice(index, {"text": text}, logprobs.of(events), reason)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls is not None:
        read = calls.add(text, last=True)
        message["content"] = read.text
        if read.calls:
            message |= {"content": read.text or None, "tool_calls": [call.as_json() for call in read.calls]}
    return _choice(index, {"message": message}, logprobs.of(events), _reason(reason, calls))


def piece_choices(
    kind: Kind,
    index: int,
    event: TokenEvent,
    logprobs: TokenLogprobs,
    prefix: str,
    calls: CallReader | None = None,
) -> list[dict[str, Any]]:
    """One event of a streamed answer; `prefix` comes before its text: the echoed prompt, or nothing. `calls`:
    finds calls of functions, which come whole, and before the end: clients look there what is complete."""
    text, details = prefix + event.text, logprobs.of([event])
    reason: str | None = event.finish_reason
    if kind == "completion":
        return [_choice(index, {"text": text}, details, reason)]
    if calls is None:
        return [_choice(index, {"delta": {"content": text}}, details, reason)]
    before = calls.count
    read = calls.add(text, last=reason is not None)
    reason = _reason(reason, calls)
    if not read.calls:
        return [_choice(index, {"delta": {"content": read.text}}, details, reason)]
    numbered = enumerate(read.calls, before)
    delta: dict[str, Any] = {"content": read.text} if read.text else {}
    delta["tool_calls"] = [{"index": number, **call.as_json()} for number, call in numbered]
    end = [] if reason is None else [_choice(index, {"delta": {}}, None, reason)]
    return [_choice(index, {"delta": delta}, details, None), *end]


def _reason(reason: str | None, calls: CallReader | None) -> str | None:
    """An answer that came to its end and has calls ends for them."""
    return "tool_calls" if reason == "stop" and calls is not None and calls.count else reason


def opening_choice(index: int) -> dict[str, Any]:
    """What a streamed answer to a chat begins with."""
    return _choice(index, {"delta": {"role": "assistant", "content": ""}}, None, None)


def _choice(
    index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    finish_reason = None if reason is None else _FINISH_REASONS[reason]
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Numbers of tokens; `cached_tokens` of the prompt were found computed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
