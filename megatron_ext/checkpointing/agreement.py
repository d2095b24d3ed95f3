"""Steps that ranks take together, and whose outcome is the same for all of them.

A rank that fails on its own while the others walk into the next collective is how saving and loading come to
hang. Here a step ends with the ranks telling each other how it went:
either all go on or all raise the same error.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpointing.errors import CheckpointError, DiskFullError, MissingRanksError, disk_full_in
from megatron_ext.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """An exception in a form that every rank can raise again."""

    error_type: type[Exception]
    message: str


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T | None
    failure: _Failure | None


class Agreement:
    """Runs the steps of saves or of a load over all ranks. Make it with `agreement`."""

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self.group = group
        """All ranks, over gloo."""
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._timeout = timeout

    def everywhere(self, step: str, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; returns this rank's result when it succeeded on all ranks.

        Raises, on all ranks: CheckpointError or a class of it where the user can help (the first rank's
        message, with the ranks that failed), RuntimeError with the traceback
        for everything else, MissingRanksError.
        """
        outcome = _attempt(action)
        self._exchange(step, outcome.failure)
        return outcome.value  # type: ignore[return-value]

    def gather(self, step: str, action: Callable[[], T]) -> list[T]:
        """Like `everywhere`, but returns every rank's result, in rank order.
        Results are pickled: keep them small."""
        outcome = _attempt(action)
        self._exchange(step, outcome.failure)
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, outcome.value, group=self.group)
        return values

    def on_first(self, step: str, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 only; its result, or its error, reaches every rank."""
        outcome: list[Any] = [_attempt(action) if self.rank == 0 else None]
        self._meet(step)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[0].failure is not None:
            raise _as_error(step, outcome[0].failure, "")
        return outcome[0].value

    def divide(self, step: str, action: Callable[[], T], share: Callable[[list[T]], list[T]]) -> T:
        """Runs `action` on every rank; `share` makes of all results, on rank 0, the part of each rank, which
        is returned there."""
        results = self.to_first(step, action)
        shared = _attempt(lambda: share(results)) if self.rank == 0 else None
        parts: list[Any] = [None] * self.world_size
        if shared is not None:
            values = [None] * self.world_size if shared.value is None else shared.value
            parts = [_Outcome(value, shared.failure) for value in values]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, parts if self.rank == 0 else None, src=0, group=self.group)
        if mine[0].failure is not None:
            raise _as_error(step, mine[0].failure, "")
        return mine[0].value

    def to_first(self, step: str, action: Callable[[], T]) -> list[T]:
        """Like `gather`, but only rank 0 gets the results; the others get none."""
        outcome = _attempt(action)
        self._exchange(step, outcome.failure)
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(outcome.value, values, dst=0, group=self.group)
        return values or []

    def is_everywhere(self, answer: bool) -> bool:
        """Whether `answer` is yes on every rank. A small collective, for the boundaries of steps."""
        answers = torch.tensor(int(answer))
        dist.all_reduce(answers, op=dist.ReduceOp.MIN, group=self.group)
        return bool(answers.item())

    def _exchange(self, step: str, failure: _Failure | None) -> None:
        self._meet(step)
        failures: list[_Failure | None] = [None] * self.world_size
        dist.all_gather_object(failures, failure, group=self.group)
        failed = [rank for rank, failure in enumerate(failures) if failure is not None]
        if failed:
            # A full disk says more than what follows from it on other ranks.
            first = min(failed, key=lambda rank: not issubclass(failures[rank].error_type, DiskFullError))  # type: ignore[union-attr]
            raise _as_error(step, failures[first], f" (on {_name_ranks(failed)})")  # type: ignore[arg-type]

    def _meet(self, step: str) -> None:
        try:
            dist.monitored_barrier(self.group, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            minutes = self._timeout.total_seconds() / 60
            raise MissingRanksError(
                f"checkpoint, step '{step}': not every rank arrived within {minutes:g} minutes, as rank "
                f"{self.rank} saw it: {error}"
            ) from error


@contextmanager
def agreement(timeout_minutes: float) -> Iterator[Agreement]:
    """An Agreement over all ranks. A rank that is missing at a step for longer than the time-out is an error
    on the others."""
    timeout = timedelta(minutes=timeout_minutes)
    try:
        if missing := _roll_call(timeout):
            raise MissingRanksError(
                f"checkpoint: {_name_ranks(missing)} did not come to it within {timeout_minutes:g} minutes"
            )
        # gloo, whatever the default backend: plans and messages need no GPU memory, and only gloo can say who
        # is missing.
        group = dist.new_group(backend="gloo", timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise MissingRanksError(
            f"checkpoint: not every rank came to it within {timeout_minutes:g} minutes; rank 0 says which. "
            f"({error})"
        ) from error
    try:
        yield Agreement(group, timeout)
    finally:
        dist.destroy_process_group(group)


def _roll_call(timeout: timedelta) -> list[int]:
    """On rank 0, waits until every rank has called this as often as rank 0 has; returns those that have not.
    Others go on."""
    store = dist.distributed_c10d._get_default_store()
    calls = store.add(f"checkpoint/calls/{dist.get_rank()}", 1)
    missing = list(range(dist.get_world_size())) if dist.get_rank() == 0 else []
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [rank for rank in missing if store.add(f"checkpoint/calls/{rank}", 0) < calls]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return missing


def _attempt(action: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(action(), None)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - told, whatever it is
        return _Outcome(None, _describe(error))


def _describe(error: BaseException) -> _Failure:
    # What torch's distributed checkpoint collected from the ranks comes before its own wrapper.
    errors = (
        [inner for inner, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    )
    for inner in errors:
        if isinstance(inner, DiskFullError):
            return _Failure(DiskFullError, str(inner))
        if full := disk_full_in(inner):
            return _Failure(DiskFullError, str(full))
    for inner in errors:
        if isinstance(inner, ConfigError):
            return _Failure(type(inner), str(inner))
        if isinstance(inner, OSError):
            return _Failure(CheckpointError, f"{type(inner).__name__}: {inner}")
    return _Failure(RuntimeError, "".join(traceback.format_exception(error)))


def _as_error(step: str, failure: _Failure, where: str) -> Exception:
    if issubclass(failure.error_type, ConfigError):
        plain_system_error = failure.error_type is CheckpointError
        return failure.error_type(
            f"{step}{where}: {failure.message}" if plain_system_error or where else failure.message
        )
    return RuntimeError(f"checkpoint, step '{step}'{where}: {failure.message}")


def _name_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
