"""Reading pieces of files that may be cut short, replaced or lost while they are read.

Memory maps do not serve: a page that is gone by then kills the process with SIGBUS, without a word.
"""

import errno
import os
import resource
from collections import OrderedDict
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_ext.errors import ConfigError

_MOST = 512
"""Files that are open at a time; opening one again takes microseconds."""
_SHARE = 4
"""One of so many descriptors that a process may have is for data."""


def open_limit() -> int:
    """How many files a process may have open at once, `ulimit -n`."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class OpenFiles:
    """Files that are read again and again. Those that were read last are open, any number may be known.

    Forked processes go on with the descriptors they have got; to others only the limit is sent.
    """

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: files open at a time; default: a share of what the process may have open, 512 at most."""
        allowed = open_limit()
        share = _MOST if allowed == resource.RLIM_INFINITY else max(1, allowed // _SHARE)
        self.limit = min(_MOST, share) if limit is None else limit
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = Lock()  # a descriptor must not be closed, and given to another file, while it is read

    def __reduce__(self) -> Any:
        return OpenFiles, (self.limit,)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._open)

    def read(self, file: "OpenFile", offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`, fewer at the file's end. Raises OSError and `file.damaged`."""
        with self._lock:
            descriptor = self._descriptor(file)
            data = os.pread(descriptor, size, offset)
            while len(data) < size:  # the kernel gives at most 2 GiB at a time
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        return data

    def size(self, file: "OpenFile") -> int:
        """Bytes in a file now. Raises OSError and `file.damaged`."""
        with self._lock:
            return os.fstat(self._descriptor(file)).st_size

    def _descriptor(self, file: "OpenFile") -> int:
        if file.path in self._open:
            self._open.move_to_end(file.path)
            return self._open[file.path]
        while len(self._open) >= self.limit:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(file.path, os.O_RDONLY)
        try:
            file.require_same(os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        self._open[file.path] = descriptor
        return descriptor


class OpenFile:
    """A file that is read at any place, by any number of processes: forked ones share it, to others its path
    is sent. It is opened when it is read first, and may be closed and opened again between."""

    def __init__(self, path: Path, remedy: str, files: OpenFiles | None = None) -> None:
        """`remedy`: what to do about a damaged file, a sentence for messages. `files`: with which others it
        shares descriptors, default: with none. Raises ConfigError where there is no such file."""
        self.path = path
        self._remedy = remedy
        self._files = OpenFiles(1) if files is None else files
        try:
            self._state = os.stat(path)
        except OSError as error:
            raise self._failed("cannot be opened", error) from error

    def __reduce__(self) -> Any:
        return partial(OpenFile, self.path, self._remedy, self._files), ()

    @property
    def size(self) -> int:
        """Bytes in the file now. Raises ConfigError where it cannot be opened."""
        try:
            return self._files.size(self)
        except OSError as error:
            raise self._failed("cannot be opened", error) from error

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`. Raises ConfigError where the file has fewer, or cannot be read."""
        try:
            data = self._files.read(self, offset, size)
        except OSError as error:
            raise self._failed(f"cannot be read at byte {offset}", error) from error
        if len(data) < size:
            raise self.damaged(
                f"ends after {self.size} bytes, but bytes {offset} to {offset + size} are asked for: it was "
                "cut short since it was checked"
            )
        return data

    def require_same(self, state: os.stat_result) -> None:
        """Raises `damaged` for a file that has taken this one's place: one of another size, or neither the
        same file nor written at the same time."""
        first = self._state
        same = (state.st_dev, state.st_ino) == (first.st_dev, first.st_ino)
        if state.st_size != first.st_size or not (same or state.st_mtime_ns == first.st_mtime_ns):
            raise self.damaged(
                f"{state.st_size} bytes, but {first.st_size} when it was looked at first: it was replaced or "
                "changed since"
            )

    def damaged(self, reason: str) -> ConfigError:
        """The error for this file."""
        return ConfigError(f"{self.path}: {reason}. {self._remedy}")

    def _failed(self, what: str, error: OSError) -> ConfigError:
        return too_many_files(self.path, error) or self.damaged(f"{what} ({error.strerror})")


def too_many_files(path: Path, error: Exception) -> ConfigError | None:
    """That the process has too many files open, where that is the error: the file itself may be good."""
    if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return ConfigError(
        f"{path} cannot be opened: too many files are open, of {open_limit()} that this process may have "
        "(ulimit -n). Nothing is wrong with the file: raise the limit, such as with ulimit -n 4096."
    )
