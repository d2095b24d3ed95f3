"""Signals that ask a program to end: Ctrl-C (SIGINT), SIGTERM, SIGHUP (a terminal that closes) and SIGUSR1 (a
batch system's warning).

A program ends with one line. What it was writing is removed, or completed. A second signal ends it at once. A
signal that whoever started the program had it ignore (nohup) stays ignored.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_SAME_REQUEST_SECONDS = 1.0
"""Launchers and batch systems often send one request twice: to a process, and to its group."""


class Interrupted(KeyboardInterrupt):
    """A signal has asked the program to end. Its text is the line that is shown."""

    def __init__(self, number: int, line: str | None = None) -> None:
        self.number = number
        super().__init__(line or f"stopped by {signal.Signals(number).name}")

    @property
    def exit_status(self) -> int:
        """As shells write it: 128 and the signal's number."""
        return 128 + self.number


class Repetition:
    """Tells a second request from the first one that was sent twice."""

    def __init__(self) -> None:
        self._first: float | None = None

    def is_second(self) -> bool:
        """For each signal that arrives: whether it is another request than the first."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > _SAME_REQUEST_SECONDS


def end_at_once(number: int, line: str) -> NoReturn:
    """End the process with `line` on stderr, in whatever state it is."""
    os.write(2, f"\n{line}\n".encode())
    os._exit(128 + number)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """While the context is open, `handler` takes the signals. Does nothing outside the main thread, which
    alone may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def interruptible() -> Iterator[None]:
    """A signal raises Interrupted in the main thread, so that what is half-written is removed; a second one
    ends the process at once."""
    repetition, interrupted = Repetition(), False

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if repetition.is_second():
            end_at_once(number, f"stopped at once by a second signal, {signal.Signals(number).name}")
        if not interrupted:
            interrupted = True
            raise Interrupted(number)

    with handling(interrupt):
        yield


def ignore_all() -> None:
    """For processes that must outlive the request: the one that started them ends them."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def live_as_long_as_parent() -> None:
    """For worker processes of multiprocessing: ignore the signals, which the whole group may get, and end
    with the process that started this one, however that ends."""
    ignore_all()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, name="parent", daemon=True).start()


@contextmanager
def deferred() -> Iterator[None]:
    """While the context is open, signals wait; the handler of the first one runs at its end. For short steps
    that must be done whole. (A mask of the main thread would not do: any other thread may take the signal.)

    Does nothing outside the main thread, in which alone handlers run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    heeded = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.getsignal(number) for number in heeded}
    try:
        for number in heeded:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def blocked() -> Iterator[None]:
    """A process that is started while the context is open never hears of the signals, not even before it has
    come to `live_as_long_as_parent`. This process may hear of them, by another thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def watching(watch: Callable[[int], object]) -> Iterator[None]:
    """While the context is open, a thread calls `watch` with the number of each signal of `ENDING` that is
    handled, also while the main thread is deep in a long computation, where no handler runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def read() -> None:
        while number := os.read(reading, 1)[0]:
            if number in ENDING:  # torch's data loader handles SIGCHLD, which comes whenever a process ends
                watch(number)
        os.close(reading)

    threading.Thread(target=read, name="signals", daemon=True).start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        os.close(writing)
