"""Reading gzip and Zstandard files as streams of bytes, with an error for damaged or truncated ones.

The first bytes of a file tell how it is compressed. A name that says otherwise is an error.
"""

import io
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, Protocol, cast

from megatron_ext.errors import ConfigError

Compression = Literal["", "gz", "zst"]

CHUNK_BYTES = 1 << 20
MAGIC_BYTES = 4
"""How many of a file's first bytes tell its compression."""
_COMPRESSED_CHUNK_BYTES = 1 << 12
"""Small, for all that comes out of one piece is in memory at once: of gzip at most 1032 times as much."""
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PASSED_OVER = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""How a Zstandard frame begins that holds no content."""


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
    if start.startswith(_ZSTD_MAGIC) or _PASSED_OVER.match(start):
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


def _pieces(disk: BinaryIO, most: float = float("inf")) -> Iterator[bytes]:
    """The next bytes of a file, at most `most`, in small pieces."""
    while most and (data := disk.read(int(min(most, _COMPRESSED_CHUNK_BYTES)))):
        most -= len(data)
        yield data


def _zstd_pieces(disk: BinaryIO) -> Iterator[bytes]:
    """A Zstandard file, block by block (RFC 8878, section 3.1.1): 128 KiB at most come out of one. Of four
    bytes a run can have as much, so that pieces of a fixed size may hold any amount.

    What is no frame goes on in pieces as it is; the decompressor finds fault with it.
    """
    while magic := disk.read(MAGIC_BYTES):
        yield magic
        if _PASSED_OVER.fullmatch(magic):
            size = disk.read(4)
            yield size
            yield from _pieces(disk, int.from_bytes(size, "little"))
        elif magic == _ZSTD_MAGIC:
            yield from _frame_pieces(disk)
        else:
            yield from _pieces(disk)


def _frame_pieces(disk: BinaryIO) -> Iterator[bytes]:
    """A frame behind its magic number: header, blocks, checksum."""
    descriptor = disk.read(1)
    flags = int.from_bytes(descriptor, "little")
    single_segment = flags >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[flags >> 6]
    yield descriptor + disk.read((1 - single_segment) + (0, 1, 2, 4)[flags & 3] + content_size)
    is_last = False
    while not is_last:
        head = disk.read(3)
        value = int.from_bytes(head, "little")
        is_last, is_run = bool(value & 1) or len(head) < 3, (value >> 1 & 3) == 1
        yield head + disk.read(1 if is_run else value >> 3)
    if flags >> 2 & 1:
        yield disk.read(4)


class _MemberStream(io.RawIOBase):
    """The concatenated contents of the members of a file.

    The readers of the libraries do not serve: zstandard's takes a truncated file for a complete one.
    """

    def __init__(self, path: str, disk: BinaryIO, compression: Compression) -> None:
        self._path = path
        self._compression = compression
        self._pieces = _zstd_pieces(disk) if compression == "zst" else _pieces(disk)
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
            data = data or next(self._pieces, b"")
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
