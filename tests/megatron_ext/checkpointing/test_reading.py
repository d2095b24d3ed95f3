"""Reading a checkpoint runs no code from it; its files stay in Megatron's own format."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_ext.checkpointing import records, state
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError
from megatron_ext.checkpointing.manifest import hash_files, list_files, read_manifest
from megatron_ext.checkpointing.reading import read_common, read_entries
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks


class _Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _save(directory: Path) -> Path:
    run = Run(Case())
    run.train(1)
    return run.save(directory, 1)


def _is_evil(path: Path, trap: Path) -> bool:
    """The tests below test something: plain unpickling of this file springs the trap."""
    try:
        pickle.loads(path.read_bytes())
    except Exception:
        torch.load(path, weights_only=False)
    sprung = trap.is_dir()
    trap.rmdir()
    return sprung


def test_the_table_of_contents_is_not_trusted(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil(trap)))
    assert _is_evil(tmp_path / ".metadata", trap)
    with pytest.raises(
        DamagedCheckpointError, match=r"\.metadata cannot be read: it names posix\.mkdir, which is not part"
    ):
        read_contents(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "name", ["torch.hub.load", "torch.load", "torch._utils._rebuild_tensor", "builtins.eval"]
)
def test_only_the_listed_names_are_known(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(DamagedCheckpointError, match=name):
        read_contents(tmp_path)
    nested = b"\x80\x04\x8c\x05torch\x8c" + bytes([len("hub.load")]) + b"hub.load\x93."
    (tmp_path / ".metadata").write_bytes(nested)
    with pytest.raises(DamagedCheckpointError, match=r"torch\.hub\.load"):
        read_contents(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps({"a": 1}), b"\x00garbage"])
def test_other_contents_are_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata (cannot be read|holds a dict)"):
        read_contents(tmp_path)


def test_the_common_part_is_not_trusted(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"optimizer": _Evil(trap)}, tmp_path / "common.pt")
    assert _is_evil(tmp_path / "common.pt", trap)
    with pytest.raises(DamagedCheckpointError, match=r"common\.pt is damaged: it names posix\.mkdir"):
        read_common(tmp_path)
    assert not trap.exists()


def _load_evil_object(directory: Path, trap: Path) -> str:
    """A checkpoint with a valid manifest whose object shard is evil: what a stranger could hand out.

    This project's models have no object shards; here the model's extra state is kept to be one.
    """
    append, run = records.HashedFile.append, Run(Case())

    def poisoned(file: records.HashedFile, content: Any) -> Any:
        return append(file, [_Evil(trap)] if isinstance(content, list) else content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.HashedFile, "append", poisoned)
        patch.setattr(state, "_without_extra_state", lambda chunk: chunk)
        path = run.save(directory, 1)
        manifest = read_manifest(path)
        assert manifest.files == hash_files(path, list_files(path))
        with pytest.raises(DamagedCheckpointError) as refusal:
            run.load(path)
    return str(refusal.value)


def test_objects_are_not_trusted(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (message,) = run_on_ranks(1, _load_evil_object, tmp_path, trap)
    assert "damaged: it names" in message
    assert "mkdir" in message
    assert not trap.exists()


def _load_with_megatron(directory: Path) -> bool:
    """Whether Megatron's own reader finds in our files what ours finds."""
    path = _save(directory)
    plain = dist_checkpointing.load_plain_tensors(str(path))
    assert plain.pop("optimizer")["param_state_sharding_type"] == "fully_reshardable"
    contents = read_contents(path).state_dict_metadata
    assert len(plain) > 30
    assert plain.keys() == {key for key, entry in contents.items() if hasattr(entry, "size")}
    empty = {key: torch.zeros_like(value) for key, value in plain.items()}
    sharded = [dist_checkpointing.ShardedTensor.from_rank_offsets(key, value) for key, value in empty.items()]
    read_entries(sharded, path, read_contents(path))
    return all(torch.equal(empty[key], value) for key, value in plain.items())


def test_the_files_are_megatrons_own_format(tmp_path: Path) -> None:
    assert run_on_ranks(1, _load_with_megatron, tmp_path) == [True]
