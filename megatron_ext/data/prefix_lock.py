"""One job at a time under a prefix of datasets."""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from megatron_ext.checkpointing.errors import FolderInUseError, UnwritableFolderError
from megatron_ext.checkpointing.lock import FolderLock, Purpose
from megatron_ext.errors import ConfigError
from megatron_ext.signals import deferred

_ATTEMPTS = 5


@contextlib.contextmanager
def locked(prefixes: Iterable[str]) -> Iterator[None]:
    """Be the only process that writes datasets of these names, by a folder .NAME.lock beside each.

    Raises ConfigError where another process is, or where nothing can be written.
    """
    with ExitStack() as stack:
        for prefix in sorted(set(prefixes)):
            stack.enter_context(_locked(prefix))
        yield


@contextlib.contextmanager
def _locked(prefix: str) -> Iterator[None]:
    folder = Path(prefix).with_name(f".{Path(prefix).name}.lock")
    lock = FolderLock(
        folder,
        purpose=Purpose(
            f"--output-prefix: {prefix}",
            "Two jobs under one prefix would destroy each other's files: wait for that job or end it, or "
            "choose another --output-prefix",
        ),
    )
    try:
        _take(lock, prefix)
        yield
    finally:
        with deferred():
            lock.release()
            with contextlib.suppress(OSError):  # another job has it
                folder.rmdir()


def _take(lock: FolderLock, prefix: str) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            lock.take()
            break
        except FolderInUseError as error:
            raise ConfigError(f"{error}.") from None
        except UnwritableFolderError as error:
            # The job before may take its folder away in the moment in which this one has found it.
            if attempt < _ATTEMPTS - 1 and isinstance(error.__cause__, FileNotFoundError):
                continue
            raise ConfigError(f"--output-prefix {prefix} cannot be written: {error.__cause__}.") from error
