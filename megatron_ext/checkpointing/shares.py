"""Ranks of a data-parallel group hold copies of the same weights: which of them writes one, or reads it for
all. Every rank works it out by itself."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica

from megatron_ext.checkpointing.buckets import is_in_buckets
from megatron_ext.checkpointing.slices import Slice


def is_copied(entry: ShardedBase) -> bool:
    """Whether all ranks of the data-parallel group hold this entry; the parts of a distributed optimizer's
    state are one rank's."""
    return not isinstance(entry, Slice) and not is_in_buckets(entry.key)


def entries_to_write(entries: Sequence[ShardedBase], group: dist.ProcessGroup) -> list[ShardedBase]:
    """The entries that this rank writes, of all that it holds."""
    owners, rank = owners_of(entries, group.size()), group.rank()
    return [entry for entry in entries if _is_writer(entry, owners.get(id(entry)), rank)]


def _is_writer(entry: ShardedBase, owner: int | None, rank: int) -> bool:
    if owner is None:
        return is_main_replica(entry.replica_id)
    assert isinstance(entry.replica_id, tuple) and entry.replica_id[-1] == rank, entry
    return owner == rank and not any(entry.replica_id[:-1])


def entries_to_read(entries: Sequence[ShardedBase], group: dist.ProcessGroup) -> list[ShardedBase]:
    """The entries that this rank reads; the others come to it by `send_around`."""
    owners, rank = owners_of(entries, group.size()), group.rank()
    return [
        entry
        for entry in entries
        if not isinstance(entry, ShardedTensor) or owners.get(id(entry), rank) == rank
    ]


def send_around(entries: Sequence[ShardedBase], group: dist.ProcessGroup) -> None:
    """Brings what one rank of the group has read to the others, tensor by tensor. Collective in the group."""
    if group.size() == 1:
        return
    owners = owners_of(entries, group.size())
    for entry in entries:
        if isinstance(entry, ShardedTensor) and (owner := owners.get(id(entry))) is not None:
            tensor = entry.data.detach()
            whole = tensor.contiguous()
            dist.broadcast(whole, group=group, group_src=owner)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)


def owners_of(entries: Sequence[ShardedBase], ranks: int) -> dict[int, int]:
    """The rank of the group that stands for each entry that all of them hold, by `id`: so that all have about
    as many bytes."""
    loads = [0] * ranks
    owners = {}
    copied = [entry for entry in entries if is_copied(entry)]
    for entry in sorted(copied, key=_bytes, reverse=True):  # sorting keeps the order of equals on every rank
        owner = loads.index(min(loads))
        loads[owner] += _bytes(entry)
        owners[id(entry)] = owner
    return owners


def _bytes(entry: ShardedBase) -> int:
    return entry.data.nbytes if isinstance(entry.data, torch.Tensor) else 1
