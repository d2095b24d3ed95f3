"""Saves of a run, each so that at every moment, whatever dies, the directory holds the last good checkpoint.

In the background: the state is copied to the host's memory, a thread of each rank writes the copy while the
run goes on, and at the first boundary of two steps at which all threads are done the ranks make a checkpoint
of it. The thread takes part in no collective. A process would need the copy in memory that it can share, and
a start that CUDA survives, and gains nothing: writing and hashing hold no lock of Python's.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.checkpointing import writing
from megatron_ext.checkpointing.agreement import Agreement, agreement
from megatron_ext.checkpointing.buckets import Sharding
from megatron_ext.checkpointing.folders import checkpoint_name
from megatron_ext.checkpointing.lock import FolderLock
from megatron_ext.checkpointing.shards import Copies
from megatron_ext.checkpointing.writing import OpenSave, RunState, Written
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Flight:
    """A save that goes on beside the run."""

    save: OpenSave
    written: "Future[Written]"
    began: float
    """By time.perf_counter, as the next."""
    stalled: float
    """For how long the run stood still when it began."""


class Saves:
    """The saves of one run into one folder. All ranks call the methods together. Make it with `saves`."""

    def __init__(
        self,
        ranks: Agreement,
        lock: FolderLock,
        directory: Path,
        *,
        keep_last: int | None,
        in_background: bool,
        sharding: Sharding,
    ) -> None:
        self._ranks, self._lock, self._directory = ranks, lock, directory
        self._keep_last, self._in_background, self._sharding = keep_last, in_background, sharding
        self._flight: _Flight | None = None
        self._copies: Copies = {}  # kept: to ask the system for memory takes longer than to copy
        self._stalled = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether a save is under way beside the run."""
        return self._flight is not None

    def save(self, iteration: int, state: RunState) -> None:
        """Saves `state`, or begins to, after the one that is in flight.

        Raises the same error on all ranks and leaves earlier checkpoints as they were: DiskFullError (also
        before anything is written, when it will not fit), FolderInUseError where another run writes there,
        CheckpointError for other failures of files, MissingRanksError.
        """
        self.finish()
        began = time.perf_counter()
        opened = writing.open_save(
            self._ranks,
            self._lock,
            self._directory,
            iteration,
            state,
            sharding=self._sharding,
        )
        if self._in_background:
            self._copies = writing.stage(self._ranks, opened, self._copies)
            written = _in_background(lambda: writing.write_state(opened, self._ranks.rank))
            stalled = time.perf_counter() - began
            self._flight = _Flight(opened, written, began, stalled)
            self._stalled += stalled
        else:
            self._publish(opened, lambda: writing.write_state(opened, self._ranks.rank), began, 0.0)

    def settle(self) -> None:
        """At the boundary of two steps: if a save is in flight and all ranks have written it, makes a
        checkpoint of it. Raises as `save` does."""
        if self._flight is not None and self._ranks.is_everywhere(self._flight.written.done()):
            self.finish()

    def finish(self) -> None:
        """Waits for the save in flight, if there is one. Raises as `save` does."""
        if (flight := self._flight) is not None:
            self._flight = None
            self._publish(flight.save, flight.written.result, flight.began, flight.stalled)

    def abandon(self) -> None:
        """After an error of this rank alone: ends the save in flight without a checkpoint of it. No
        collective."""
        if self._flight is not None:
            self._flight.written.exception()  # waits
            if self._ranks.rank == 0:
                shutil.rmtree(self._flight.save.staging, ignore_errors=True)
            self._flight = None

    def stalled_seconds(self) -> float:
        """For how long the run stood still for saves since the last call."""
        seconds, self._stalled = self._stalled, 0.0
        return seconds

    def _publish(
        self, opened: OpenSave, written: Callable[[], Written], began: float, stalled: float
    ) -> None:
        resumed = time.perf_counter() if self._in_background else began
        path, manifest = writing.publish(self._ranks, self._lock, opened, written, self._keep_last)
        ended = time.perf_counter()
        self._stalled += ended - resumed
        if self._ranks.rank == 0:
            logger.info(
                "saved %s (%.1f MB) in %.2f s; the run stood still for %.2f s of them",
                path,
                manifest.bytes / 1e6,
                ended - began,
                stalled + ended - resumed,
            )


@contextmanager
def saves(
    directory: Path,
    *,
    keep_last: int | None = None,
    timeout_minutes: float = 30.0,
    in_background: bool = False,
    sharding: Sharding = "fully_reshardable",
) -> Iterator[Saves]:
    """The saves of a run into new folders of `directory`, in one process group. All ranks enter together.

    After a save all but the last `keep_last` checkpoints are deleted (None: none is). A checkpoint of the
    same iteration is replaced. A rank that does not come to a step within `timeout_minutes` is an error on
    the others. With `in_background` a save goes on beside the run; leaving the context waits for it. Each
    rank then keeps another copy of what it writes in the host's memory. Needs model parallelism to be
    initialised.
    """
    if keep_last is not None and keep_last < 1:
        raise ConfigError(
            f"checkpoint.keep_last: {keep_last} given; at least 1 is needed, or null to keep all"
        )
    lock = FolderLock(Path(directory))  # held already by a run that has taken it for all of its saves
    with agreement(timeout_minutes) as ranks:
        made = Saves(
            ranks,
            lock,
            Path(directory),
            keep_last=keep_last,
            in_background=in_background,
            sharding=sharding,
        )
        try:
            yield made
            made.finish()
        finally:
            made.abandon()
            lock.release()


def save_checkpoint(
    directory: Path,
    iteration: int,
    *,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    progress: Mapping[str, Any],
    config: Mapping[str, Any],
    keep_last: int | None = None,
    timeout_minutes: float = 30.0,
) -> Path:
    """Saves a run into a new folder of `directory`; returns the folder. All ranks call it together.

    The state is as `RunState` says, the rest as for `saves`. Raises as `Saves.save` does.
    """
    with saves(directory, keep_last=keep_last, timeout_minutes=timeout_minutes) as made:
        made.save(iteration, RunState(model, optimizer, scheduler, progress, config))
    return Path(directory) / checkpoint_name(iteration)


def _in_background(action: Callable[[], Written]) -> "Future[Written]":
    """What a thread will have done, or raised. It does not keep a process alive that is to end."""
    done: Future[Written] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised by whoever asks for the result
            done.set_exception(error)

    threading.Thread(target=run, name="checkpoint writer", daemon=True).start()
    return done
