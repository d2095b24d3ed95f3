"""Files of records: what is written is what is read, whatever its shape, and is hashed on the way."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_ext.checkpointing import shards
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.manifest import hash_files
from megatron_ext.checkpointing.reading import read_entries
from megatron_ext.checkpointing.records import HashedFile, write_contents
from megatron_ext.checkpointing.shards import Shards


def test_tensors_of_any_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RECORD_BYTES", 100)
    whole = torch.arange(60, dtype=torch.float32).view(10, 6)
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "in several records": whole,
        "rows of another": whole[2:4],
        "columns of another": whole[:, 1:3],
        "a part of much": torch.ones(100_000)[5:8],
        "bfloat16": whole.bfloat16()[1:],
        "whole numbers": torch.tensor([1, 2**40]),
    }
    entries = [ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()]
    written = Shards(entries, tmp_path, rank=0).write()
    write_contents(tmp_path, written.records)
    assert written.files == hash_files(tmp_path, ["__0_0.distcp"])
    assert max(record.place.length for record in written.records) < 2000, "nothing beside a view is written"
    assert sum(record.key == "in several records" for record in written.records) == 3
    empty = {key: torch.full_like(tensor, -1).contiguous() for key, tensor in tensors.items()}
    targets = [ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in empty.items()]
    read_entries(targets, tmp_path, read_contents(tmp_path))
    for key, tensor in tensors.items():
        assert torch.equal(empty[key], tensor), key


def test_a_file_is_hashed_as_it_lies_there(tmp_path: Path) -> None:
    pieces = [b"a" * 3, b"b" * 2**20, b"c" * (3 * 2**20 + 5), b"", b"d"]
    with HashedFile(tmp_path / "file") as file:
        assert [file.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.entry == hash_files(tmp_path, ["file"])["file"]
