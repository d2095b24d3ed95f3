"""Requests to the engine: what a user hands in, what comes back token by token,
and what is there at the end."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lckv.generation.sampling import Choice, SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: a stop text or token or the end of the sequence; its length, the model's context or
the cache; a call to `cancel`; a failure, which `Completion.error` describes."""


class QueueFullError(RuntimeError):
    """Too many requests are waiting; try again later."""


@dataclass(frozen=True)
class TokenEvent:
    """One step of an answer."""

    request_id: str

    token: int | None
    """The new token, a stop token included; None for an end that came without one (cancelled, error)."""

    text: str
    """What is certain of the answer's text now and was not before: whole characters, nothing of a stop text.
    Always empty for an engine without a tokenizer. Texts of all events make the answer."""

    text_offset: int
    """Characters of the answer before `text`."""

    finish_reason: FinishReason | None = None
    """Set on a request's last event only."""

    logprob: float | None = None
    """See `SamplingParams.logprobs`."""

    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most probable tokens at this place, the best first, and their log-probabilities."""

    prompt_logprobs: tuple[Choice, ...] | None = None
    """In a request's first event: as `Completion.prompt_logprobs`."""


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    request_id: str
    token_ids: tuple[int, ...]
    """The answer's tokens; those of a stop text and a stop token are among them."""

    text: str
    """Without special tokens and without the stop text. Empty for an engine without a tokenizer."""

    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    """One for each token where the request asked for them."""

    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each token the most probable ones and their log-probabilities."""

    stopped_by: str | int | None = None
    """The stop text or the token that ended it."""

    error: str | None = None
    """What went wrong, where `finish_reason` is "error"."""

    preemptions: int = 0
    """How often its memory was given to others in between."""

    prefill_passes: int | None = None
    """Passes over the iterated layers that the prompt took (the most of any part of it);
    None where no layer is iterated."""

    prompt_logprobs: tuple[Choice, ...] | None = None
    """The prompt's tokens but the first, each with its log-probability after those before it and with the
    most probable ones, where the request asked for them."""


class Request:
    """A request that was handed in: a handle to wait for its answer. Other threads may use it."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        on_token: Callable[[TokenEvent], None] | None = None,
    ) -> None:
        self.request_id, self.prompt_ids, self.params, self.on_token = (
            request_id,
            prompt_ids,
            params,
            on_token,
        )
        self._done = threading.Event()
        self._completion: Completion | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the answer, while another thread runs the engine.
        Raises TimeoutError after `timeout` seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(
                f"request {self.request_id} is not finished after {timeout} seconds; does a thread run the "
                "engine's step?"
            )
        assert self._completion is not None
        return self._completion

    def finish(self, completion: Completion) -> None:
        """Called by the engine, once."""
        self._completion = completion
        self._done.set()
