"""The files of PyTorch's distributed checkpoints (`__0_0.distcp`, ...): records of torch.save one behind the
other, each a block of a tensor, and `.metadata`, the table of contents.

PyTorch's own reader takes whole records into memory, and unpickles them; here any of their rows are read
(`lckv/weights/pickled_file.py`). Its writer (2.13) keeps
all tensors of a file in memory until the file is written; here each is forgotten at once
(`megatron_ext/checkpointing/records.py`).
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats.pieces import Piece, cover
from lckv.weights.pickled_data import ForbiddenNameError
from lckv.weights.pickled_file import READING_ERRORS, read_torch_file
from lckv.weights.pickled_tensor import PickledTensor
from lckv.weights.tensors import TensorInfo, row_chunks
from megatron_ext.checkpointing.manifest import FileEntry
from megatron_ext.checkpointing.records import HashedFile, Record, append_block, write_contents

FILE_BYTES = 4 * 2**30
"""A file is full from here on: ranks that load share the checking of hashes file by file."""


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
    if stored is None:
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
            self._tensor.copy_rows(start, stop, target)
        except ForbiddenNameError as error:
            raise ConversionError(
                f"{self.path}: {self.key} cannot be read, the file is damaged or holds something else than "
                f"tensors. Nothing of it was run: {error}."
            ) from error
        except READING_ERRORS as error:
            raise ConversionError(
                f"{self.path}: {self.key} cannot be read, the file is damaged: {error}"
            ) from error

    @cached_property
    def _tensor(self) -> PickledTensor:
        stored = read_torch_file(self.path, offset=self.offset, length=self.length)
        if not isinstance(stored, PickledTensor) or stored.info != TensorInfo(self.shape, self.dtype):
            raise ValueError("it is not the tensor of which the table of contents speaks")
        return stored


def write_tensors(
    folder: Path, infos: Mapping[str, TensorInfo], read: Callable[[str, slice], Tensor]
) -> dict[str, FileEntry]:
    """Writes the tensors `infos`, and .metadata, into a folder. `read(key, rows)` is called for rows of about
    CHUNK_BYTES at a time, in order. Returns size and sha256 of the files with tensors."""
    records: list[Record] = []
    with ExitStack() as stack:
        files = [stack.enter_context(HashedFile(folder / "__0_0.distcp"))]
        for key, info in infos.items():
            for rows in row_chunks(info):
                if files[-1].bytes >= FILE_BYTES:
                    files.append(stack.enter_context(HashedFile(folder / f"__{len(files)}_0.distcp")))
                offsets = (rows.start, *[0] * (len(info.shape) - 1))
                records.append(append_block(files[-1], key, info, offsets, read(key, rows)))
    write_contents(folder, records)
    return {file.path.name: file.entry for file in files}
