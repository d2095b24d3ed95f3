"""The engine in a thread of its own, for an asynchronous server:
requests go in, events come out in the event loop."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from lckv.generation.engine import Engine
from lckv.generation.requests import TokenEvent
from lckv.generation.sampling import SamplingParams

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
"""How long the idle engine waits before it looks whether it shall stop."""


class EngineFailedError(RuntimeError):
    """The engine's thread has died; the server answers nothing any more."""


class Answer:
    """The events of one request, as an asynchronous iterator that ends with the last one."""

    def __init__(self, request_id: str, cancel: Callable[[str], bool]) -> None:
        self.request_id, self._cancel = request_id, cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        self._finished = False

    def put(self, event: TokenEvent | None) -> None:
        """From the engine's thread. None: the engine has failed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while not self._finished:
            event = await self._events.get()
            if event is None:
                self._finished = True
                raise EngineFailedError("the engine has failed; see the server's log")
            self._finished = event.finish_reason is not None
            yield event

    def cancel(self) -> None:
        """Give up whatever is not finished; its memory returns to the others."""
        if not self._finished:
            self._finished = True
            self._cancel(self.request_id)


class EngineWorker:
    """Runs the engine's steps until it is stopped."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._stopping = threading.Event()
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def healthy(self) -> bool:
        """Whether requests are being answered."""
        return self._failure is None and self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Cancel what still runs and end the thread; TimeoutError after `timeout` seconds."""
        self._stopping.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(
                f"the engine's thread has not ended {timeout} seconds after it was asked to; it is in a step."
            )

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str) -> Answer:
        """Hand in a request, from the event loop. Raises what `Engine.submit` raises,
        and EngineFailedError."""
        answer = Answer(request_id, self._cancel)
        with self._lock:
            if not self.healthy:
                raise EngineFailedError(
                    "the server is shutting down" if self._failure is None else "the engine has failed"
                )
            self._answers[request_id] = answer
        try:
            self.engine.submit(prompt_ids, params, request_id=request_id, on_token=self._deliver)
        except BaseException:
            self._forget(request_id)
            raise
        return answer

    def _deliver(self, event: TokenEvent) -> None:
        with self._lock:
            answer = self._answers.get(event.request_id)
        if answer is not None:
            answer.put(event)
        if event.finish_reason is not None:
            self._forget(event.request_id)

    def _cancel(self, request_id: str) -> bool:
        self._forget(request_id)
        return self.engine.cancel(request_id)

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._answers.pop(request_id, None)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self.engine.wait_for_work(_POLL_SECONDS):
                    self.engine.step()
        except BaseException as failure:
            logger.exception("the engine has failed; the server answers nothing any more")
            self._failure = failure
        finally:
            self._end_answers()

    def _end_answers(self) -> None:
        with self._lock:
            left = list(self._answers.values())
            self._answers.clear()
        for answer in left:
            if self._failure is None:
                self.engine.cancel(answer.request_id)
            answer.put(None)
