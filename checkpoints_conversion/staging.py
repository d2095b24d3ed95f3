"""The folder that a conversion writes: under another name beside its place until it is whole and proven, then
moved there.

ckpt/.llama2.converting/  being written; a conversion that fails or is stopped removes it, after a crash the
                          next one does
ckpt/llama2/              there in full, or not at all
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints_conversion.errors import ConversionError
from megatron_ext.atomic import move
from megatron_ext.checkpointing.errors import disk_full_in

logger = logging.getLogger(__name__)

_ROOM_BYTES = 64 * 2**20
"""For everything in a folder but the numbers."""


def check_free(target: Path) -> None:
    """Raises ConversionError unless `target` is a folder that may be written: absent, or empty."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        kind = "is not empty" if target.is_dir() else "is a file"
        raise ConversionError(
            f"{target} {kind}; a conversion writes a new folder: choose another name, or remove this one."
        )


@contextmanager
def staged(target: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A new folder to write some `needed_bytes` of weights into, which is moved to `target` at the end. After
    an exception, whichever, it is removed.

    Raises ConversionError where `target` is taken, another conversion is writing it,
    there is no space, or writing fails.
    """
    check_free(target)
    target = target.absolute()
    staging = target.with_name(f".{target.name}.converting")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _taken(staging):
            _clear(staging)
            try:
                _check_space(staging, needed_bytes)
                yield staging
                check_free(target)
                move(staging, target)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
    except Exception as error:
        # torch.save tells of a full disk in an error of its own.
        cause = error if isinstance(error, OSError) else disk_full_in(error)
        if cause is None:
            raise
        raise ConversionError(f"{target} cannot be written: {cause}. Nothing is left of it.") from error


def _check_space(folder: Path, needed_bytes: int) -> None:
    needed, free = needed_bytes + _ROOM_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"{folder.parent}: the model takes about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free. "
            "Free some space, or give a folder on another file system."
        )


@contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """The folder, made if need be, in the hands of this process alone."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"{folder}: another conversion is writing there; wait for it, or choose another name."
            ) from None
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    leftovers = list(folder.iterdir())
    if leftovers:
        logger.warning("removing what a conversion that did not finish has left in %s", folder)
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
