"""One writer at a time in a folder of checkpoints.

    DIRECTORY/lock.json     its owner, see `owner.py`; it was last changed at the owner's last sign of life

The owner makes the file where there is none (the one operation that also NFS does for one process only),
touches it every BEAT_SECONDS, and deletes it when it ends, also with an error. A crash leaves it behind. It
is stale
  - at once, where the owner ran on this machine and is gone, or was this Slurm job before it was requeued;
  - else after STALE_SECONDS without a sign of life, by the clock of the file system, none of which may come
    while it is watched for two beats.
Who finds a stale one takes it over. flock is not used: over NFS it can be local to a machine, or lost.

An owner that did not run for so long (stopped, its machine suspended) can lose the folder while it lives. So
every save takes the lock again: that costs nothing where it is still held, and fails where it is not.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from megatron_ext.atomic import discard
from megatron_ext.checkpointing.errors import FolderInUseError, unwritable
from megatron_ext.checkpointing.owner import Owner, is_gone, read_owner, this_process
from megatron_ext.signals import deferred

LOCK_NAME = "lock.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 180.0
"""Longer than NFS keeps the time of a change (60 s) and than a process is usually held up."""
_POLL_SECONDS = 1.0
_ATTEMPTS = 20
_MOST_BYTES = 65536

logger = logging.getLogger(__name__)


class Purpose(NamedTuple):
    """What a folder is locked for, for messages."""

    place: str
    """The setting that names it, and what it names."""

    advice: str
    """What two processes would do there, and the way out."""


class FolderLock:
    """The right of this process to write into `directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        purpose: Purpose | None = None,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        """`purpose`: by default that of checkpoint.save."""
        self._directory = Path(directory)
        self._purpose = purpose or Purpose(
            f"checkpoint.save: {directory}",
            "Two runs in one folder would destroy each other's checkpoints: wait for that run or end it, or "
            "choose another checkpoint.save",
        )
        self._path = self._directory / LOCK_NAME
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._released = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self) -> None:
        """Makes the folder if need be, and becomes its owner, or does nothing where this process owns it
        already. Waits for a sign of life of an owner that cannot be seen from here.

        Raises FolderInUseError, UnwritableFolderError and DiskFullError.
        """
        here = this_process()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for _ in range(_ATTEMPTS):
                with deferred():  # a signal comes before or after: what is made is also held
                    made = _create(self._path, here)
                    if made:
                        self._start_beating(here)
                if made:
                    return
                content = _read(self._path)
                owner = read_owner(content)
                if owner is not None and owner.is_same_process(here):
                    return
                gone = None if owner is None else is_gone(owner, here)
                if gone is False or not (gone or self._falls_silent(owner)):
                    break
                _set_aside(self._path, content, here)
            raise FolderInUseError(self._explain(read_owner(_read(self._path))))
        except OSError as error:
            raise unwritable(self._directory, error) from error

    def release(self) -> None:
        """Gives the folder back, if this has taken it. What fails is only logged."""
        if self._heart is None:
            return
        self._released.set()
        self._heart.join(self._beat_seconds)  # a dead file server may hold it
        self._heart = None
        try:
            if _is_of(self._path, this_process()):
                self._path.unlink()
        except OSError as error:
            logger.warning("%s could not be deleted: %s", self._path, error)

    def _start_beating(self, here: Owner) -> None:
        if self._heart is not None:  # somebody has deleted the file in between
            return
        self._released.clear()
        self._heart = threading.Thread(target=self._beat, args=(here,), daemon=True)
        self._heart.start()

    def _beat(self, here: Owner) -> None:
        """Gives signs of life until the release; makes the file again where somebody has deleted it."""
        while not self._released.wait(self._beat_seconds):
            try:
                if _is_of(self._path, here):
                    os.utime(self._path)
                elif _create(self._path, here):
                    logger.warning("%s was deleted while this run holds it; made again", self._path)
            except OSError as error:
                logger.debug("no sign of life in %s: %s", self._path, error)

    def _falls_silent(self, owner: Owner | None) -> bool:
        """Watches the file. False at the first sign of life."""
        started, first = time.monotonic(), _changed(self._path)
        logger.warning(
            "%s: %s cannot be seen from here; waiting up to %g seconds for a sign of life",
            self._path,
            owner or "its unknown owner",
            self._stale_seconds,
        )
        while first is not None:
            time.sleep(min(_POLL_SECONDS, self._beat_seconds))
            changed, watched = _changed(self._path), time.monotonic() - started
            if changed != first:
                return changed is None
            silent = max(watched, self._time_of_files() - first)
            if watched > 2 * self._beat_seconds and silent > self._stale_seconds:
                logger.warning("%s: no sign of life for %.0f seconds; taking over", self._path, silent)
                return True
        return True

    def _time_of_files(self) -> float:
        """Now, by the clock of the file system."""
        with tempfile.TemporaryFile(dir=self._directory) as file:
            return os.fstat(file.fileno()).st_mtime

    def _explain(self, owner: Owner | None) -> str:
        changed = _changed(self._path)
        ago = "" if changed is None else f", last seen {max(0.0, self._time_of_files() - changed):.0f} s ago"
        return (
            f"{self._purpose.place} is in use by {owner or 'an unknown process'}{ago}. "
            f"{self._purpose.advice}. If it does not exist any more, delete {self._path}"
        )


def _create(path: Path, here: Owner) -> bool:
    """Makes the file; False where there is something already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(here.to_json())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> bytes:
    """What the file says; nothing where it is no file, or is not there."""
    try:
        # Opening makes NFS look at the file again. A FIFO must not block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            return file.read(_MOST_BYTES) or b""
    except OSError:
        return b""


def _is_of(path: Path, here: Owner) -> bool:
    owner = read_owner(_read(path))
    return owner is not None and owner.is_same_process(here)


def _changed(path: Path) -> float | None:
    """When the file was changed last, by the clock of the file system; None where it is not there."""
    _read(path)
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return None


def _set_aside(path: Path, judged: bytes, here: Owner) -> None:
    """Removes the file if it is still the one that was judged; else another process has been faster."""
    aside = path.with_name(f".lock.{here.token}.trash")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) == judged:
            discard(aside)
        else:
            os.rename(aside, path)
