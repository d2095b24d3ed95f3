"""Some bytes of a file, as a file."""

import os
from io import RawIOBase
from typing import Any, BinaryIO, cast


class FilePart(RawIOBase):
    """The bytes offset : offset + length of a file that stays open."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position, which may be beyond the end."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, target: Any) -> int:
        """Fills a buffer with the next bytes, as many as there are."""
        wanted = max(0, min(len(target), self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = cast(Any, self._file).readinto(memoryview(target)[:wanted]) or 0
        self._position += count
        return count
