"""What can go wrong with a checkpoint. Every rank raises the same error with the same message."""

import errno
from pathlib import Path

from megatron_ext.errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint could not be written or read; the message says which, why, and the way out."""


class FolderInUseError(CheckpointError):
    """Another run writes into the folder."""


class UnwritableFolderError(CheckpointError):
    """Checkpoints cannot be written into the folder."""


class DiskFullError(CheckpointError):
    """There is not enough space for a checkpoint."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete or its files are not the ones that were written."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint where one was to be loaded from."""


class MismatchError(CheckpointError):
    """A checkpoint belongs to another model, optimizer or schedule."""


class MissingRanksError(TimeoutError):
    """Some ranks did not come to a step that needs all of them; the message names the step and the ranks."""


def disk_full_in(error: BaseException | None) -> OSError | None:
    """The full disk (or quota) that an exception came from, if so.

    torch.save reports a short write as "unexpected pos 704 vs 598",
    raised while handling the error that says why.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """The error that says why `path`, checkpoint.save or a file in it, cannot be written."""
    reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
    place = "" if error.filename in (None, str(path)) else f" ({error.filename})"
    said = f"checkpoint.save: {path} cannot be written: {reason}{place}"
    if disk_full_in(error):
        return DiskFullError(f"{said}. Free some space, or set checkpoint.save to another file system")
    return UnwritableFolderError(f"{said}. Give a folder, new or not, into which this user may write")
