"""Which ranks are slower than the others.

The time of a step says nothing: all ranks wait for the slowest. So each rank measures its own part, from the
beginning of a step to the moment when it begins to exchange gradients with its data-parallel copies. Ranks of
one tensor- or pipeline-parallel group wait for each other in that part too, and are slow together. No step is
synchronised for it: CUDA's events are read every N steps.
"""

import logging
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from megatron_ext.parallel.process_groups import device_of_rank

logger = logging.getLogger(__name__)

_TOLERANCE = 1.1
"""How many times the median a rank may need before it is named."""
_NAMED = 8


class OwnTimes:
    """This rank's times. Make it with `own_times`."""

    def __init__(self, interval: int, hosts: list[str]) -> None:
        self._interval, self._hosts = interval, hosts
        self._moments: list[tuple[Any, Any]] = []
        self._began: Any = None

    def begin(self) -> None:
        """A step begins."""
        self._began = _moment()

    def end_own_part(self) -> None:
        """What follows of the step needs other ranks."""
        if self._began is not None:
            self._moments.append((self._began, _moment()))
            self._began = None

    def compare(self, iteration: int) -> None:
        """Every so many iterations: all ranks exchange their mean times, and rank 0 says who is slow."""
        if iteration % self._interval or not self._moments:
            return
        mean = statistics.fmean(_seconds(*pair) for pair in self._moments)
        steps, self._moments = len(self._moments), []
        own = torch.tensor([mean], dtype=torch.float64, device=device_of_rank())
        times = [torch.zeros_like(own) for _ in self._hosts]
        dist.all_gather(times, own)
        if dist.get_rank() == 0:
            logger.info("%s", describe(steps, [time.item() for time in times], self._hosts))


def describe(steps: int, seconds: list[float], hosts: list[str]) -> str:
    """In one line: median and maximum of the ranks' mean times, and who is slow."""
    median = statistics.median(seconds)
    slow = sorted(
        (rank for rank, own in enumerate(seconds) if own > _TOLERANCE * median),
        key=lambda rank: -seconds[rank],
    )
    named = [f"rank {rank} on {hosts[rank]} {seconds[rank]:.3g} s" for rank in slow[:_NAMED]]
    more = f" and {len(slow) - _NAMED} more" if len(slow) > _NAMED else ""
    line = (
        f"own time of the ranks, mean of {steps} iterations: median {median:.3g} s, longest "
        f"{max(seconds):.3g} s"
    )
    return f"{line}; stragglers: {', '.join(named)}{more}" if named else line


@contextmanager
def own_times(interval: int, model: MegatronModule) -> Iterator[OwnTimes | None]:
    """Measures while the context is open, which all ranks enter; None with `interval` 0."""
    if interval == 0:
        yield None
        return
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    times = OwnTimes(interval, hosts)
    config: Any = model.config
    finalize: Callable[..., None] = config.finalize_model_grads_func

    def noted(*arguments: Any, **options: Any) -> None:
        times.end_own_part()
        finalize(*arguments, **options)

    config.finalize_model_grads_func = noted
    try:
        yield times
    finally:
        config.finalize_model_grads_func = finalize


def _moment() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000
