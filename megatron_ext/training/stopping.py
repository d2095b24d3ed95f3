"""When a run ends before its last iteration: a signal from the batch system, or its time is up. All ranks
agree on it.

Signals must reach the training processes, not torchrun: torchrun dies of SIGUSR1, and after a SIGTERM it
leaves them 30 seconds before it kills them. train.exit_duration_minutes needs no signal and counts from the
start of the process, loading included.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megatron_ext.parallel.process_groups import device_of_rank

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Collects reasons to stop on this rank."""

    def __init__(self, exit_duration_minutes: float | None) -> None:
        started = psutil.Process().create_time()
        self._deadline = None if exit_duration_minutes is None else started + 60 * exit_duration_minutes
        self._signal = 0

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """Signal handler."""
        self._signal = number

    def agreed(self) -> str | None:
        """Why to stop now, the same on every rank; None to go on. Collective over all ranks."""
        overdue = self._deadline is not None and time.time() >= self._deadline
        request = torch.tensor([self._signal, int(overdue)], device=device_of_rank())
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        number, overdue = request.tolist()
        if number:
            return f"signal {signal.Signals(number).name}"
        return "train.exit_duration_minutes are over" if overdue else None


@contextmanager
def stop_requests(exit_duration_minutes: float | None) -> Iterator[StopRequest]:
    """Listen for SIGTERM and SIGUSR1 while the context is open."""
    request = StopRequest(exit_duration_minutes)
    before = {number: signal.signal(number, request.note) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
