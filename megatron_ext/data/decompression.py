"""Reading .gz and .zst files as streams of bytes, with an error for files that are truncated or damaged."""

import io
import zlib
from typing import BinaryIO, Protocol, cast

from megatron_ext.errors import ConfigError

CHUNK_BYTES = 1 << 20
_COMPRESSED_CHUNK_BYTES = 1 << 14
"""Small, for all that comes out of one chunk is in memory at once."""


class _Decompressor(Protocol):
    """What decompresses one member (gzip) or frame (zstd)."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes) -> bytes: ...


def decompressed(path: str, disk: BinaryIO) -> BinaryIO:
    """The bytes in the open file `disk`, decompressed if the name `path` ends with .gz or .zst.

    Reading raises ConfigError, naming the file, if it is damaged or ends too early.
    """
    if not path.endswith((".gz", ".zst")):
        return disk
    return cast(BinaryIO, io.BufferedReader(_MemberStream(path, disk), CHUNK_BYTES))


class _MemberStream(io.RawIOBase):
    """The concatenated contents of the members of a file.

    The readers of the libraries do not serve: zstandard's takes a truncated file for a complete one.
    """

    def __init__(self, path: str, disk: BinaryIO) -> None:
        self._path = path
        self._disk = disk
        self._member = self._new_member()
        self._inside = False
        self._text = memoryview(b"")

    def _new_member(self) -> _Decompressor:
        if self._path.endswith(".gz"):
            return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._text:
            data = self._member.unused_data if self._member.eof else b""
            data = data or self._disk.read(_COMPRESSED_CHUNK_BYTES)
            if not data and self._inside:
                raise self._damaged("it ends too early")
            if not data:
                return 0
            self._decompress(data)
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def _decompress(self, data: bytes) -> None:
        if self._member.eof:
            self._member = self._new_member()
        try:
            self._text = memoryview(self._member.decompress(data))
        except Exception as error:
            raise self._damaged(str(error)) from error
        self._inside = not self._member.eof

    def _damaged(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._path}: truncated or damaged ({reason}); make or copy the file again.")
