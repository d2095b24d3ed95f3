"""When a run ends before its last iteration: a signal from a person or the batch system, or its time is up.
All ranks agree on it.

The run then saves and ends. A second signal ends it at once, unless a save is under way: that is completed.
Torchrun passes SIGINT, SIGTERM and SIGHUP on, and leaves the processes 30 seconds before it kills them; it
dies of SIGUSR1, which therefore must be sent to the training processes. train.exit_duration_minutes needs no
signal and counts from the start of the process, loading included.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megatron_ext.parallel.process_groups import device_of_rank
from megatron_ext.signals import Repetition, end_at_once, handling, watching


class StopRequest:
    """Collects reasons to stop on this rank."""

    def __init__(self, exit_duration_minutes: float | None) -> None:
        started = psutil.Process().create_time()
        self._deadline = None if exit_duration_minutes is None else started + 60 * exit_duration_minutes
        self._repetition = Repetition()
        self._lock = threading.Lock()
        self._saving = self._in_flight = False
        self._second = 0
        self._noted = 0
        self.number = 0
        """The signal that asked for it, on any rank, once agreed; 0: none."""

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """Signal handler."""
        self._noted = self._noted or number

    def watch(self, number: int) -> None:
        """Called for every signal by a thread of its own: a second request ends the process, or waits for the
        save."""
        with self._lock:
            if not self._repetition.is_second():
                return
            if not (self._saving or self._in_flight):
                _end(number)
            self._second = number

    def agreed(self) -> str | None:
        """Why to stop now, the same on every rank; None to go on. Collective over all ranks.

        With a reason the last save counts as under way.
        """
        overdue = self._deadline is not None and time.time() >= self._deadline
        request = torch.tensor([self._noted, int(overdue)], device=device_of_rank())
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        self.number, overdue = request.tolist()  # what is noted meanwhile is kept for the next time
        if not self.number and not overdue:
            return None
        with self._lock:
            self._saving = True
        if self.number:
            return f"signal {signal.Signals(self.number).name}"
        return "train.exit_duration_minutes are over"

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A save: a second signal that comes meanwhile ends the process behind it."""
        with self._lock:
            before, self._saving = self._saving, True
        yield
        with self._lock:
            self._saving = before
        if self._second and not before:
            _end(self._second)

    def save_in_flight(self, is_so: bool) -> None:
        """Whether a save goes on beside the run: a second signal waits until it is complete."""
        with self._lock:
            self._in_flight = is_so
        if self._second and not (is_so or self._saving):
            _end(self._second)


def _end(number: int) -> None:
    name = signal.Signals(number).name
    end_at_once(number, f"stopped at once by a second signal, {name}; steps since the last save are lost")


@contextmanager
def stop_requests(exit_duration_minutes: float | None) -> Iterator[StopRequest]:
    """Listen for signals while the context is open, which must include the last save."""
    request = StopRequest(exit_duration_minutes)
    with handling(request.note), watching(request.watch):
        yield request
