"""How tensors get into the files of Megatron's `torch_dist` format.

The files are the ones that `megatron.core.dist_checkpointing` reads and writes; two things differ from its
own strategies.

**No process is forked or spawned for writing.** Megatron's writer forks, from a process that holds CUDA and
gloo threads; a child that dies there (for example for want of psutil) leaves the parent waiting forever. Here
every rank writes its file itself.

**A file is written once, from its beginning to its end, and hashed on the way.** It holds records of
torch.save one behind the other, each a block of a tensor. Tensors of the host's memory are written from where
they are; of others at most RECORD_BYTES are copied at a time.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from lckv.weights.tensors import TensorInfo
from megatron_ext.checkpointing.manifest import FileEntry

RECORD_BYTES = 64 * 2**20
"""A block of a tensor that is larger is cut into several, by rows."""
_PIECE_BYTES = 2**20
"""Hashed, and written while the processor still has it at hand."""


class HashedFile:
    """A file that is written once, from its beginning to its end; closing it puts it on the disk.

    It is hashed and written in pieces of _PIECE_BYTES that begin at a multiple of it, so that the system need
    not join parts of its pages; only what does not fill a piece is copied before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._waiting = bytearray()
        self._digest = hashlib.sha256()
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by its owner

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self._put(self._waiting)
                os.fsync(self._file.fileno())

    def write(self, data: Any) -> int:
        """Appends bytes."""
        content = memoryview(data).cast("B")
        start, end = 0, len(content)
        self.bytes += end
        if len(self._waiting) + end < _PIECE_BYTES:  # nearly always: a record has some 40 small parts
            self._waiting += content
            return end
        while start < end:
            stop = min(end, start + _PIECE_BYTES - len(self._waiting))
            piece = content[start:stop]
            if self._waiting or len(piece) < _PIECE_BYTES:
                self._waiting += piece
                if len(self._waiting) == _PIECE_BYTES:
                    self._put(self._waiting)
                    self._waiting = bytearray()
            else:
                self._put(piece)
            start = stop
        return end

    def _put(self, piece: bytearray | memoryview) -> None:
        self._digest.update(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Nothing is gained by it: pieces are written when they are full."""

    def append(self, content: Any) -> _StorageInfo:
        """Appends what torch.save makes of `content`; says where it lies."""
        start = self.bytes
        torch.save(content, cast(BinaryIO, self))
        return _StorageInfo(self.path.name, start, self.bytes - start)

    @property
    def entry(self) -> FileEntry:
        """What is in the file, when it is closed."""
        return FileEntry(self.bytes, self._digest.hexdigest())


@dataclass(frozen=True)
class Record:
    """A block of a tensor, or an object, in a file."""

    key: str
    info: TensorInfo | None
    """Of the whole tensor; None of an object."""
    offsets: tuple[int, ...]
    """Where the block begins in the whole."""
    shape: tuple[int, ...]
    place: _StorageInfo


def append_block(
    file: HashedFile, key: str, whole: TensorInfo, offsets: Sequence[int], block: Tensor
) -> Record:
    """Appends a block of the tensor `key`."""
    return Record(key, whole, tuple(offsets), tuple(block.shape), file.append(_alone(block)))


def _alone(block: Tensor) -> Tensor:
    """The block in the host's memory, without what lies beside it: of a view, torch saves all that it is a
    view of. Copied only where it must be."""
    block = block.detach().cpu().contiguous()
    if block.untyped_storage().nbytes() == block.nbytes:
        return block
    numbers = torch.from_numpy(block.reshape(-1).view(torch.uint8).numpy())
    return numbers.view(block.dtype).view(block.shape)


def write_contents(checkpoint: Path, records: Sequence[Record]) -> None:
    """Writes the table of contents, `.metadata`.

    Raises RuntimeError where the blocks of a tensor do not make it up: a bug of this program's.
    """
    blocks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        blocks[record.key].append(record)
    entries = {key: _described(key, parts) for key, parts in blocks.items()}
    results = [
        WriteResult(
            MetadataIndex(record.key, None if record.info is None else torch.Size(record.offsets)),
            record.place.length,
            record.place,
        )
        for record in records
    ]
    writer = dcp.FileSystemWriter(checkpoint)
    writer.finish(Metadata(entries), [results])


def _described(key: str, blocks: Sequence[Record]) -> TensorStorageMetadata | BytesStorageMetadata:
    info = blocks[0].info
    if info is None and len(blocks) == 1:
        return BytesStorageMetadata()
    numbers = sum(math.prod(block.shape) for block in blocks)
    if info is None or any(block.info != info for block in blocks) or numbers != math.prod(info.shape):
        raise RuntimeError(f"the blocks of {key} that the ranks have written do not make up {info}")
    chunks = [ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.shape)) for block in blocks]
    return TensorStorageMetadata(TensorProperties(info.dtype), torch.Size(info.shape), chunks)
