"""Files and directories that are either there in full or not at all, also after a crash of the machine."""

import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def sync_file(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Replaces `path` by a file with this content; a reader, or a crash, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove_entry(temporary)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move(source: Path, target: Path) -> None:
    """Renames a file or a directory inside one directory, for good."""
    os.rename(source, target)
    sync_file(target.parent)


def remove_entry(path: Path) -> None:
    """Deletes whatever has this name, if anything: a file, a directory with all that is in it, a link but not
    what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """As `remove_entry`, for what nobody needs: a failure is only logged."""
    try:
        remove_entry(path)
    except OSError as error:
        logger.warning("%s could not be deleted: %s", path, error)
