"""Which rank writes and reads what several hold copies of."""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_ext.checkpointing.shares import entries_to_read, entries_to_write, send_around
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks

SIZES = {"a": 2, "b": 3, "c": 1, "d": 4}


def shares() -> tuple[list[str], list[str], dict[str, list[float]]]:
    Run(Case())  # makes the groups
    rank = dist.get_rank()
    entries = [
        ShardedTensor.from_rank_offsets(name, torch.full((size,), -1.0 - rank), replica_id=(0, 0, rank))
        for name, size in SIZES.items()
    ]
    group = dist.group.WORLD
    assert group is not None
    read = entries_to_read(entries, group)
    for entry in read:
        entry.data.fill_(len(entry.key) + SIZES[entry.key])
    send_around(entries, group)
    written = [entry.key for entry in entries_to_write(entries, group)]
    return (
        written,
        [entry.key for entry in read],
        {entry.key: entry.data.unique().tolist() for entry in entries},
    )


def test_each_copy_is_written_and_read_once_and_reaches_all() -> None:
    (first, first_read, values), (second, second_read, others) = run_on_ranks(2, shares)
    assert sorted(first + second) == sorted(first_read + second_read) == sorted(SIZES)
    assert sum(SIZES[name] for name in first) == sum(SIZES[name] for name in second)
    assert values == others == {name: [1.0 + size] for name, size in SIZES.items()}
