"""What one rank writes of a sharded state: its own file, from its own memory or from a copy of it on the
host."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch import Tensor

from lckv.weights.tensors import TensorInfo, row_chunks
from megatron_ext.checkpointing.manifest import FileEntry
from megatron_ext.checkpointing.records import RECORD_BYTES, HashedFile, Record, append_block

Copies = dict[tuple[str, tuple[int, ...]], Tensor]
"""Tensors in the host's memory, by their keys and places in a checkpoint."""


@dataclass(frozen=True)
class WrittenShards:
    """What a rank has written."""

    records: list[Record]
    files: dict[str, FileEntry]
    """By name; none where the rank has nothing to write."""


class Shards:
    """What this rank writes of a sharded state."""

    def __init__(self, entries: Sequence[ShardedBase], checkpoint: Path, rank: int) -> None:
        self._entries, self._path = entries, checkpoint / f"__{rank}_0.distcp"

    def stage(self, copies: Copies) -> Copies:
        """Copies all of it to the host's memory (pinned, where it comes from a GPU): what happens to the
        tensors afterwards does not matter. Takes as much memory as this rank's file will be large.

        `copies` are those of an earlier save, whose memory is used again. Returns those of this one.
        """
        made: Copies = {}
        for entry in self._entries:
            if isinstance(entry, ShardedTensor):
                place = entry.key, entry.global_offset
                made[place] = entry.data = _copied(entry.data, copies.get(place))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return made

    def write(self) -> WrittenShards:
        """Writes this rank's file. No collective."""
        if not self._entries:
            return WrittenShards([], {})
        with HashedFile(self._path) as file:
            records = [record for entry in self._entries for record in _append(file, entry)]
        return WrittenShards(records, {self._path.name: file.entry})


def _append(file: HashedFile, entry: ShardedBase) -> Iterator[Record]:
    if isinstance(entry, ShardedObject):
        yield Record(entry.unique_key, None, (), (), file.append([entry.data]))
        return
    assert isinstance(entry, ShardedTensor)
    whole = TensorInfo(tuple(entry.global_shape), entry.data.dtype)
    block = entry.data[(None,) * entry.prepend_axis_num]
    if block.nbytes <= RECORD_BYTES:
        yield append_block(file, entry.key, whole, entry.global_offset, block)
        return
    for rows in row_chunks(TensorInfo(tuple(block.shape), block.dtype), RECORD_BYTES):
        start = (entry.global_offset[0] + rows.start, *entry.global_offset[1:])
        yield append_block(file, entry.key, whole, start, block[rows])


def _copied(tensor: Tensor, memory: Tensor | None) -> Tensor:
    if memory is None or (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
        memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return memory.copy_(tensor.detach(), non_blocking=True)
