"""Files and directories that are either there in full or not at all, also after a crash of the machine."""

import os
import shutil
from pathlib import Path


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


def remove_tree(path: Path, trash: Path) -> None:
    """Deletes a directory. It first gets the name `trash`:
    a crash cannot leave a half that looks like the whole."""
    move(path, trash)
    shutil.rmtree(trash)
