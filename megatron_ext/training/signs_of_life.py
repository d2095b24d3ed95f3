"""To whom a run says that it goes on: the other ranks, a file for whoever watches from outside, and the
monitor of nvidia-resiliency-ext."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_ext.atomic import write_file
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.heartbeats import heartbeats

logger = logging.getLogger(__name__)

Beat = Callable[[int], None]
"""Told the iteration that this rank has come to."""

_PAUSE_SECONDS = 1.0


@contextmanager
def signs_of_life(run: RunConfig) -> Iterator[Beat]:
    """While the context is open, which all ranks enter, the main thread calls what this yields when it has
    come to an iteration, or goes on within it. Raises LostRankError as `heartbeats` does, ConfigError where
    the monitor cannot be reached."""
    with ExitStack() as stack:
        beats = [stack.enter_context(heartbeats(run.parallel.distributed_timeout_minutes))]
        if run.logging.heartbeat_file is not None and dist.get_rank() == 0:
            beats.append(stack.enter_context(heartbeat_file(Path(run.logging.heartbeat_file))))
        if run.parallel.fault_tolerance:
            beats.append(stack.enter_context(_rank_monitor()))

        def beat(iteration: int) -> None:
            for one in beats:
                one(iteration)

        yield beat


@contextmanager
def heartbeat_file(path: Path) -> Iterator[Beat]:
    """A thread replaces the file when there is a new sign of life: a dead file server stops no training."""
    latest: tuple[int, float] | None = None
    ended = threading.Event()

    def beat(iteration: int) -> None:
        nonlocal latest
        latest = (iteration, time.time())

    def write() -> None:
        written = None
        while True:
            is_last, sign = ended.is_set(), latest
            if sign is not None and sign != written:
                written = sign
                _write(path, *sign)
            if is_last:
                return
            ended.wait(_PAUSE_SECONDS)

    thread = threading.Thread(target=write, name="heartbeat file", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        ended.set()
        thread.join(2 * _PAUSE_SECONDS)


def _write(path: Path, iteration: int, seconds: float) -> None:
    try:
        write_file(path, json.dumps({"iteration": iteration, "time": seconds}).encode())
    except OSError as error:
        logger.warning("logging.heartbeat_file %s cannot be written: %s", path, error)


@contextmanager
def _rank_monitor() -> Iterator[Beat]:
    from nvidia_resiliency_ext.fault_tolerance.rank_monitor_client import RankMonitorClient

    client = RankMonitorClient()
    try:
        client.init_workload_monitoring()
    except Exception as error:  # of its own class, of sockets, or for want of a variable
        raise ConfigError(
            f"parallel.fault_tolerance is true and the monitor of nvidia-resiliency-ext cannot be reached: "
            f"{error!r}. Start the run with ft_launcher, or set the former to false."
        ) from error
    try:
        yield lambda iteration: client.send_heartbeat()
    finally:
        client.shutdown_workload_monitoring()
