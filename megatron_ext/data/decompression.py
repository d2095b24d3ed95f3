"""Reading gzip and Zstandard files as streams of bytes, with an error for damaged or truncated ones.

The first bytes of a file tell how it is compressed. A name that says otherwise is an error.
"""

import io
import re
import zlib
from typing import BinaryIO, Literal, Protocol, cast

from megatron_ext.errors import ConfigError

Compression = Literal["", "gz", "zst"]

CHUNK_BYTES = 1 << 20
MAGIC_BYTES = 4
"""How many of a file's first bytes tell its compression."""
_COMPRESSED_CHUNK_BYTES = 1 << 14
"""Small, for all that comes out of one chunk is in memory at once."""


class _Decompressor(Protocol):
    """What decompresses one member (gzip) or frame (zstd)."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes) -> bytes: ...


def compression_of(path: str, start: bytes) -> Compression:
    """How a file is compressed, "" for not at all; `start` is its first `MAGIC_BYTES` bytes.

    Raises ConfigError if the name ends with .gz or .zst and the content is something else.
    """
    if start.startswith(b"\x1f\x8b"):
        return "gz"
    if re.match(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", start):  # a frame, or one to pass over
        return "zst"
    if path.endswith((".gz", ".zst")):
        kind = "gzip" if path.endswith(".gz") else "Zstandard"
        raise _damaged(path, f"its name says {kind}, its content does not" if start else "it is empty")
    return ""


def decompressed(path: str, disk: BinaryIO, compression: Compression) -> BinaryIO:
    """The bytes in the open file `disk`, decompressed.

    Reading raises ConfigError, naming the file `path`, if it is damaged or ends too early.
    """
    if not compression:
        return disk
    return cast(BinaryIO, io.BufferedReader(_MemberStream(path, disk, compression), CHUNK_BYTES))


def _damaged(path: str, reason: str) -> ConfigError:
    return ConfigError(f"{path}: truncated or damaged ({reason}); make or copy the file again.")


class _MemberStream(io.RawIOBase):
    """The concatenated contents of the members of a file.

    The readers of the libraries do not serve: zstandard's takes a truncated file for a complete one.
    """

    def __init__(self, path: str, disk: BinaryIO, compression: Compression) -> None:
        self._path = path
        self._compression = compression
        self._disk = disk
        self._member = self._new_member()
        self._inside = False
        self._text = memoryview(b"")

    def _new_member(self) -> _Decompressor:
        if self._compression == "gz":
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
                raise _damaged(self._path, "it ends too early")
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
            raise _damaged(self._path, str(error)) from error
        self._inside = not self._member.eof
