"""Threads that prepare requests, away from the event loop: so many at once, so many that wait, so long each.

A thread cannot be stopped. What it does must be bounded: by the size of what it works on, or by `time_limit`.

Each thread has a tokenizer of its own: a Hugging Face tokenizer must not be used by two at once.
"""

import asyncio
import contextlib
import copy
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from lckv.serving.errors import ApiError

Result = TypeVar("Result")


class _Task(Generic[Result]):
    """Work for a thread, and the future of its result in the event loop."""

    def __init__(self, work: Callable[[Any], Result]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Result] = self._loop.create_future()
        self.abandoned = False
        """Nobody waits for the result any more."""

    def run(self, tokenizer: Any) -> None:
        """In a thread."""
        result: Result | None = None
        error: Exception | None = None
        try:
            if not self.abandoned:
                result = self._work(tokenizer)
        except Exception as failure:  # noqa: BLE001  # raised again in the event loop
            error = failure
        with contextlib.suppress(RuntimeError):  # the event loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class TokenizerThreads:
    """Threads with a tokenizer each; they start with the first work and end with `stop`."""

    def __init__(
        self, tokenizer: Any, *, threads: int, waiting: int, seconds: float, done: str = "tokenised"
    ) -> None:
        """`waiting`: most works that wait; `seconds`: that one may take, waiting included; `done`: what is
        done with a request."""
        self._done = done
        self._tokenizers = [copy.deepcopy(tokenizer) for _ in range(threads)]
        self._most, self._seconds = threads + waiting, seconds
        self._pending = 0
        self._queue: SimpleQueue[_Task[Any] | None] = SimpleQueue()
        self._started = False

    async def run(self, work: Callable[[Any], Result]) -> Result:
        """What `work` makes with a tokenizer. Raises what it raises, and ApiError where too many wait or it
        takes too long."""
        if self._pending >= self._most:
            raise ApiError(
                429, f"The server is busy: {self._pending} requests are being read.", retry_after=1
            )
        self._start()
        self._pending += 1
        task = _Task(work)
        try:
            self._queue.put(task)
            async with asyncio.timeout(self._seconds):
                return await task.future
        except TimeoutError:
            raise ApiError(
                503,
                f"The request was not {self._done} after {self._seconds:g} seconds; send less, or try again.",
                retry_after=1,
            ) from None
        finally:
            self._pending -= 1
            task.abandoned = True

    def stop(self) -> None:
        """End the threads when they are done."""
        for _ in self._tokenizers:
            self._queue.put(None)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for tokenizer in self._tokenizers:
                threading.Thread(target=self._serve, args=(tokenizer,), name="tokenizer", daemon=True).start()

    def _serve(self, tokenizer: Any) -> None:
        while (task := self._queue.get()) is not None:
            task.run(tokenizer)
