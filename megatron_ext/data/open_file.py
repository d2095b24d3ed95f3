"""Reading pieces of files that may be cut short, replaced or lost while they are read.

Memory maps do not serve: a page that is gone by then kills the process with SIGBUS, without a word.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError


class OpenFile:
    """A file that is read at any place, by any number of processes: forked ones share it, to others its path
    is sent."""

    def __init__(self, path: Path, remedy: str) -> None:
        """`remedy`: what to do about a damaged file, a sentence for messages. Raises ConfigError where the
        file cannot be opened."""
        self.path = path
        self._remedy = remedy
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self.damaged(f"cannot be opened ({error.strerror})") from error

    def __reduce__(self) -> Any:
        return partial(OpenFile, self.path, self._remedy), ()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Bytes in the file now."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset`. Raises ConfigError where the file has fewer, or cannot be read."""
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size:  # the kernel gives at most 2 GiB at a time
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise self.damaged(f"cannot be read at byte {offset} ({error.strerror})") from error
        if len(data) < size:
            raise self.damaged(
                f"ends after {self.size} bytes, but bytes {offset} to {offset + size} are asked for: it was "
                "cut short since it was checked"
            )
        return data

    def damaged(self, reason: str) -> ConfigError:
        """The error for this file."""
        return ConfigError(f"{self.path}: {reason}. {self._remedy}")
