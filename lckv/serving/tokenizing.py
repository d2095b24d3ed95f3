"""Threads that prepare requests, away from the event loop: so many at once, so many that wait, so long each.

Each thread has a tokenizer of its own: a Hugging Face tokenizer must not be used by two at once.
"""

import asyncio
import copy
import ctypes
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from lckv.serving.errors import ApiError

Result = TypeVar("Result")

_AGAIN_SECONDS = 0.1
"""Until work that nobody waits for is told once more to end."""


class _TookTooLongError(BaseException):
    """Raised in a thread whose work nobody waits for any more; `except Exception` lets it pass."""


class _Task(Generic[Result]):
    """Work for a thread, and the future of its result in the event loop."""

    def __init__(self, work: Callable[[Any], Result]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Result] = self._loop.create_future()
        self._lock = threading.Lock()
        self._abandoned = False
        self._thread: int | None = None

    def run(self, tokenizer: Any) -> None:
        """In a thread."""
        with self._lock:
            if self._abandoned:
                return
            self._thread = threading.get_ident()
        try:
            result, error = self._work(tokenizer), None
        except Exception as failure:  # noqa: BLE001  # raised again in the event loop
            result, error = None, failure
        with self._lock:
            self._thread = None
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._settle, result, error)

    def abandon(self) -> None:
        """Do not start, or end as soon as Python code runs again in the thread."""
        with self._lock:
            self._abandoned = True
            if self._thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(_TookTooLongError)
                )
                # Some code swallows whatever is raised in it, such as what the collector of garbage calls.
                self._loop.call_later(_AGAIN_SECONDS, self.abandon)

    def _settle(self, result: Any, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class TokenizerThreads:
    """Threads with a tokenizer each; they start with the first work and end with `stop`."""

    def __init__(self, tokenizer: Any, *, threads: int, waiting: int, seconds: float) -> None:
        """`waiting`: most works that wait; `seconds`: that one may take, waiting included."""
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
                f"The request was not tokenised after {self._seconds:g} seconds; send less, or try again.",
                retry_after=1,
            ) from None
        finally:
            self._pending -= 1
            task.abandon()

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
            try:
                task.run(tokenizer)
            except _TookTooLongError:
                continue
