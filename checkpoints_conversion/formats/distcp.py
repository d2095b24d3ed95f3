"""The files of PyTorch's distributed checkpoints (`__0_0.distcp`, ...): records of torch.save one behind the
other, each a block of a tensor, and `.metadata`, the table of contents.

PyTorch's own reader takes whole records into memory; here any of their rows are read. Its writer (2.13) keeps
all tensors of a file in memory until the file is written; here each is forgotten at once.
"""

import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats.pieces import Piece, cover
from lckv.weights.tensors import CHUNK_BYTES, TensorInfo, row_chunks
from megatron_ext.checkpointing.manifest import FileEntry

FILE_BYTES = 4 * 2**30
"""A file is full from here on: ranks that load share the checking of hashes file by file."""

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip archive's entry: the lengths of its name and of its extra field, which come before the content."""
_READING_ERRORS = (
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
)


def stored_tensors(
    checkpoint: Path, contents: Metadata, is_wanted: Callable[[str], bool]
) -> dict[str, tuple[TensorInfo, list[Piece]]]:
    """The tensors of a checkpoint with this table of contents, by their keys, and the pieces to read them
    from. Opens no file."""
    tensors = {}
    for key, entry in contents.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and is_wanted(key):
            info = TensorInfo(tuple(entry.size), entry.properties.dtype)
            pieces = [_piece(checkpoint, contents, key, info.dtype, chunk) for chunk in entry.chunks]
            if not cover(pieces, info.shape):
                raise ConversionError(
                    f"{checkpoint}: the parts of {key} that are there do not make up {list(info.shape)}."
                )
            tensors[key] = info, pieces
    return tensors


def _piece(
    checkpoint: Path, contents: Metadata, key: str, dtype: torch.dtype, chunk: ChunkStorageMetadata
) -> Piece:
    stored = (contents.storage_data or {}).get(MetadataIndex(key, chunk.offsets))
    if stored is None or Path(stored.relative_path).name != str(stored.relative_path):
        raise ConversionError(
            f"{checkpoint}: .metadata does not say where {key} is at {list(chunk.offsets)}."
        )
    path = checkpoint / stored.relative_path
    record = _Record(path, stored.offset, stored.length, key, tuple(chunk.sizes), dtype)
    return Piece(tuple(chunk.offsets), record.shape, record.copy_rows)


@dataclass(frozen=True)
class _Record:
    """A tensor that torch.save has written into the bytes offset : offset + length of a file."""

    path: Path
    offset: int
    length: int
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def copy_rows(self, start: int, stop: int, target: Tensor) -> None:
        """Reads rows start:stop into `target`, which has their shape."""
        try:
            with open(self.path, "rb") as file:
                if self._first_byte is None:
                    target.copy_(self._load(file, "cpu")[start:stop])
                else:
                    self._copy_from(file, self._first_byte, start, stop, target)
        except pickle.UnpicklingError as error:  # whose advice is to trust the file
            raise ConversionError(
                f"{self.path}: {self.key} cannot be read, the file is damaged or holds something else than "
                "tensors. Nothing of it was run."
            ) from error
        except (OSError, *_READING_ERRORS) as error:
            raise ConversionError(
                f"{self.path}: {self.key} cannot be read, the file is damaged: {error}"
            ) from error

    def _copy_from(self, file: BinaryIO, first_byte: int, start: int, stop: int, target: Tensor) -> None:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        file.seek(first_byte + start * row_bytes)
        if target.is_contiguous() and target.dtype == self.dtype:
            _fill(file, target)
            return
        for rows in row_chunks(TensorInfo((stop - start, *self.shape[1:]), self.dtype)):
            part = torch.empty((rows.stop - rows.start, *self.shape[1:]), dtype=self.dtype)
            _fill(file, part)
            target[rows] = part

    @cached_property
    def _first_byte(self) -> int | None:
        """Where in the file the tensor's elements begin, one row behind the other;
        None where they are in another order."""
        with open(self.path, "rb") as file:
            tensor = self._load(file, "meta")
            with zipfile.ZipFile(_part(file, self.offset, self.length)) as archive:
                data = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            file.seek(self.offset + data[0].header_offset)
            name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        plain = (
            len(data) == 1
            and data[0].compress_type == zipfile.ZIP_STORED
            and data[0].file_size == tensor.nbytes
        )
        if not plain or not tensor.is_contiguous() or tensor.storage_offset():
            return None
        return self.offset + data[0].header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes

    def _load(self, file: BinaryIO, device: str) -> Tensor:
        tensor = torch.load(_part(file, self.offset, self.length), map_location=device, weights_only=True)
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (self.shape, self.dtype):
            raise ValueError("it is not the tensor of which the table of contents speaks")
        return tensor


def _fill(file: BinaryIO, target: Tensor) -> None:
    """Fills a contiguous tensor with the next bytes of a file; raises EOFError."""
    missing = memoryview(cast(Any, target.reshape(-1).view(torch.uint8).numpy()))
    while missing:
        count = file.readinto(missing[:CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"it ends {len(missing)} bytes too early")
        missing = missing[count:]


def _part(file: BinaryIO, offset: int, length: int) -> BinaryIO:
    """Some bytes of a file, as a file."""
    return cast(BinaryIO, _Part(file, offset, length))


class _Part(io.RawIOBase):
    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, target: Any) -> int:
        wanted = max(0, min(len(target), self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(target)[:wanted])  # type: ignore[attr-defined]
        self._position += count
        return count


def write_tensors(
    folder: Path, infos: Mapping[str, TensorInfo], read: Callable[[str, slice], Tensor]
) -> dict[str, FileEntry]:
    """Writes the tensors `infos`, and .metadata, into a folder. `read(key, rows)` is called for rows of about
    CHUNK_BYTES at a time, in order. Returns size and sha256 of the files with tensors."""
    contents: dict[str, Any] = {}
    records: list[WriteResult] = []
    with ExitStack() as stack:
        files = [stack.enter_context(_HashedFile(folder / "__0_0.distcp"))]
        for key, info in infos.items():
            chunks = []
            for rows in row_chunks(info):
                if files[-1].bytes >= FILE_BYTES:
                    files.append(stack.enter_context(_HashedFile(folder / f"__{len(files)}_0.distcp")))
                shape = (rows.stop - rows.start, *info.shape[1:])
                chunk = ChunkStorageMetadata(
                    torch.Size((rows.start, *[0] * len(shape[1:]))), torch.Size(shape)
                )
                records.append(_append(files[-1], MetadataIndex(key, chunk.offsets), read(key, rows)))
                chunks.append(chunk)
            contents[key] = TensorStorageMetadata(
                TensorProperties(info.dtype), torch.Size(info.shape), chunks
            )
    dcp.FileSystemWriter(folder).finish(Metadata(contents), [records])
    return {file.path.name: file.entry for file in files}


def _append(file: "_HashedFile", index: MetadataIndex, rows: Tensor) -> WriteResult:
    start = file.bytes
    alone = rows.untyped_storage().nbytes() == rows.nbytes and rows.is_contiguous()
    if not alone:  # of a view, torch saves all that it is a view of
        rows = rows.clone(memory_format=torch.contiguous_format)
    torch.save(rows, cast(BinaryIO, file))
    length = file.bytes - start
    return WriteResult(index, length, _StorageInfo(file.path.name, start, length))


class _HashedFile:
    """A file that is written once, from its beginning to its end; closing it puts it on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 - closed by its owner

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self.flush()
            os.fsync(self._file.fileno())

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self.bytes += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def entry(self) -> FileEntry:
        """What is in the file."""
        return FileEntry(self.bytes, self._digest.hexdigest())
