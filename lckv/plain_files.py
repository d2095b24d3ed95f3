"""Opens files of other people's folders.

A folder may hold what only looks like a file: opening a FIFO waits for a writer who never comes, and reading
a device never ends. Links are followed, as in the cache of the Hugging Face Hub.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


MAX_BYTES = 2**30
"""Of a file that is read as a whole: what is made of it takes several times as much memory."""


class NotPlainError(OSError):
    """Something that is no file, or too large, where a file is needed that is read as a whole."""


def open_plain(path: Path, *, buffering: int = -1) -> BinaryIO:
    """The file at `path`, open for reading bytes. Never waits.

    Raises OSError as `open` does, and NotPlainError for a folder, FIFO, socket or device.
    """
    _check(path, os.stat(path).st_mode)  # opening some devices has effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of the file at `path`, which has at most so many bytes.

    Raises OSError as `open_plain` does, and NotPlainError for a larger file.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise NotPlainError(f"{path} has {size:,} bytes; at most {most:,} are read")
        return file.read(size)


def plain_size(path: Path) -> int:
    """Bytes of the file at `path`.

    Raises OSError as `open_plain` does.
    """
    status = os.stat(path)
    _check(path, status.st_mode)
    return status.st_size


def odd_entries(folder: Path) -> list[str]:
    """Everything in `folder` that is no file and no folder, each as a sentence; broken links are left out."""
    problems = []
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            problems.append(_sentence(path, mode))
    return problems


def is_plain_name(name: object) -> bool:
    """Whether `name` is that of a file in a folder, without a way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _check(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotPlainError(_sentence(path, mode))


def _sentence(path: Path, mode: int) -> str:
    kind = next((kind for test, kind in _KINDS if test(mode)), "no file")
    return f"{path} is {kind}; it must be a file"
