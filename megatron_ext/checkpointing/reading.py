"""How tensors get out of the files of Megatron's `torch_dist` format.

Every rank reads the bytes that it needs, straight to where they are needed.

**Nothing is unpickled.** Of a checkpoint's files
  - *.distcp hold tensors, and objects of Transformer Engine, each as torch.save writes it;
  - common.pt holds the optimizer's hyper-parameters: the same;
  - .metadata, the table of contents, is a pickle of torch's dataclasses;
  - all the rest is JSON and safetensors.
The pickles are read as data (`lckv/weights/pickled_data.py`, `contents.py`): a checkpoint from a stranger can
be wrong, but it cannot run anything or take up more memory than its files are large. That its files are the
ones that were written is said by the manifest, which is checked before any of them is read.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lckv.weights.pickled_file import READING_ERRORS, load_tensors, read_torch_file
from lckv.weights.pickled_tensor import PickledTensor
from megatron_ext.checkpointing.errors import DamagedCheckpointError

State = dict[str, Any]


def read_entries(entries: Iterable[ShardedBase], checkpoint: Path, contents: Metadata) -> None:
    """Fills the tensors of these entries where they lie, and gives objects to theirs. The dtypes of the
    tensors stay. No collective.

    Raises DamagedCheckpointError.
    """
    reader = _Reader(checkpoint, contents)
    for entry in entries:
        if isinstance(entry, ShardedObject):
            entry.data = reader.object(entry.unique_key)
        elif isinstance(entry, ShardedTensor):
            reader.fill(entry)


def read_common(checkpoint: Path) -> State:
    """The part of a state that is no tensor and equal on all ranks.

    Raises DamagedCheckpointError.
    """
    path = checkpoint / COMMON_STATE_FNAME
    with _damage_of(path):
        content = load_tensors(read_torch_file(path))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
        return content


class _Reader:
    def __init__(self, checkpoint: Path, contents: Metadata) -> None:
        self._checkpoint, self._contents = checkpoint, contents
        self._opened: dict[MetadataIndex, PickledTensor] = {}

    def object(self, key: str) -> Any:
        path, content = self._record(MetadataIndex(key))
        with _damage_of(path):
            (value,) = load_tensors(content)
            return value

    def fill(self, entry: ShardedTensor) -> None:
        """Fills what this rank has of a tensor, out of all blocks that the checkpoint has of it."""
        target = entry.data.detach()[(None,) * entry.prepend_axis_num]
        if entry.allow_shape_mismatch:
            target.zero_()
        stored = self._contents.state_dict_metadata.get(entry.key)
        chunks = stored.chunks if isinstance(stored, TensorStorageMetadata) else []
        filled = 0
        for chunk in chunks:
            block = _overlap(entry.global_offset, target.shape, chunk.offsets, chunk.sizes)
            if block is not None:
                here = tuple(
                    slice(start - base, start - base + count)
                    for (start, count), base in zip(block, entry.global_offset, strict=True)
                )
                there = tuple(start - base for (start, _), base in zip(block, chunk.offsets, strict=True))
                self._copy(MetadataIndex(entry.key, chunk.offsets), chunk.sizes, there, target[here])
                filled += math.prod(count for _, count in block)
        if filled != target.numel() and not entry.allow_shape_mismatch:
            raise DamagedCheckpointError(
                f"checkpoint.load: {self._checkpoint} does not have all of {entry.key}. Load another "
                "checkpoint"
            )

    def _copy(self, index: MetadataIndex, shape: torch.Size, offsets: Sequence[int], target: Tensor) -> None:
        if index not in self._opened:
            path, content = self._record(index)
            with _damage_of(path):
                if not isinstance(content, PickledTensor) or content.info.shape != tuple(shape):
                    raise ValueError(f"{index.fqn} is no tensor of the shape {list(shape)} there")
            self._opened[index] = content
        tensor = self._opened[index]
        with _damage_of(tensor.path):
            tensor.copy_block(offsets, target)

    def _record(self, index: MetadataIndex) -> tuple[Path, Any]:
        """(its file, what is there)."""
        place = self._contents.storage_data.get(index)
        if place is None:
            raise DamagedCheckpointError(
                f"checkpoint.load: {self._checkpoint} does not say where all of {index.fqn} is. Load another "
                "checkpoint"
            )
        path = self._checkpoint / place.relative_path
        with _damage_of(path):
            return path, read_torch_file(path, offset=place.offset, length=place.length)


def _overlap(
    offsets: Sequence[int], shape: Sequence[int], other_offsets: Sequence[int], other_shape: Sequence[int]
) -> list[tuple[int, int]] | None:
    """(begin, length) of what two blocks of a tensor have in common, for each axis; None where that is
    nothing."""
    block = []
    for low, count, other_low, other_count in zip(offsets, shape, other_offsets, other_shape, strict=True):
        begin = max(low, other_low)
        length = min(low + count, other_low + other_count) - begin
        if length <= 0:
            return None
        block.append((begin, length))
    return block


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """What goes wrong with reading a file of torch.save is its damage."""
    try:
        yield
    except DamagedCheckpointError:
        raise
    except READING_ERRORS as error:
        raise DamagedCheckpointError(
            f"checkpoint.load: {path} is damaged: {error}. Nothing of it was run"
        ) from error
