"""What an engine has done and is doing, in numbers."""

import time
from collections import deque
from dataclasses import dataclass

from lckv.cache.paged import PagedCache
from lckv.generation.requests import FinishReason
from lckv.generation.scheduler import Scheduler

_STEPS = 64
"""Newest steps that the rate is taken over."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and its present state."""

    generated_tokens: int
    prompt_tokens: int
    """Of requests whose prompt was taken in; once for each, however often it was computed."""

    cached_prompt_tokens: int
    """Of these, tokens that were found computed, for requests before that began alike."""

    tokens_per_second: float
    """Generated, over the newest steps."""

    running: int
    waiting: int
    finished: int
    """Requests that ended, for whatever reason."""

    cancelled: int
    failed: int
    preemptions: int
    """How often a request gave its pages back to be computed again later."""

    pages_in_use: int
    """Pages that requests hold."""

    pages_kept: int
    """Pages that only beginnings for later requests hold; requests get them when they need pages."""

    pages_free: int
    prefixes: int
    """Beginnings that are kept for later requests."""

    compression_ratio: float
    """Tokens per slot of the cache over layers, KV heads and all sequences that ran in the newest step (or
    were scored last); 1 before there was any."""

    drafted_tokens: int
    """Guessed ahead by speculative decoding, and checked."""

    accepted_tokens: int
    """Of these, tokens that came."""

    draft_acceptance: float
    """Their share; 0 before there were any."""

    prefill_passes: float
    """Passes over iterated layers that a prompt took, the mean over prompts; 0 where nothing is iterated."""


class Counters:
    """Adds up what `EngineStats` tells, in memory that does not grow."""

    def __init__(self) -> None:
        self.generated_tokens = self.prompt_tokens = self.cached_prompt_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.finished = self.cancelled = self.failed = 0
        self._passes = self._prompts = 0
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS)

    def step(self, started: float, tokens: int) -> None:
        """A step that began at `started` (time.monotonic) has given `tokens` tokens."""
        self.generated_tokens += tokens
        self._steps.append((started, tokens))

    def end(self, reason: FinishReason) -> None:
        """A request has ended."""
        self.finished += 1
        self.cancelled += reason == "cancelled"
        self.failed += reason == "error"

    def prompt(self, tokens: int, cached: int, passes: int | None) -> None:
        """A prompt was taken in, of which `cached` tokens were found computed."""
        self.prompt_tokens += tokens
        self.cached_prompt_tokens += cached
        if passes is not None:
            self._passes += passes
            self._prompts += 1

    def draft(self, drafted: int, accepted: int) -> None:
        """A request's `drafted` tokens were checked, of which `accepted` came."""
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted

    def stats(self, scheduler: Scheduler, cache: PagedCache, compression_ratio: float) -> EngineStats:
        """The numbers now."""
        steps = tuple(self._steps)
        tokens = sum(tokens for _, tokens in steps)
        return EngineStats(
            generated_tokens=self.generated_tokens,
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            tokens_per_second=tokens / (time.monotonic() - steps[0][0]) if tokens else 0.0,
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            finished=self.finished,
            cancelled=self.cancelled,
            failed=self.failed,
            preemptions=scheduler.preemptions,
            pages_in_use=cache.pages_in_use,
            pages_kept=cache.pages_kept,
            pages_free=cache.pages_free,
            prefixes=scheduler.prefixes,
            compression_ratio=compression_ratio,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            draft_acceptance=self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0,
            prefill_passes=self._passes / self._prompts if self._prompts else 0.0,
        )
