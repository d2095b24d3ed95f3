"""Everything that loading reads is listed, is what the manifest says, and lies in the folder."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError
from megatron_ext.checkpointing.folders import list_checkpoints, read_pointer
from megatron_ext.checkpointing.manifest import Layout, Manifest, hash_files, list_files, write_manifest
from megatron_ext.checkpointing.verification import COMMON_NAME, find_problems, large_files

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYOUT = Layout(device="cpu", world_size=1, tensor=1, pipeline=1, context=1, data=1)
DEEP = b"[" * 100_000


def test_the_common_file_is_called_as_megatron_calls_it() -> None:
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    assert COMMON_NAME == COMMON_STATE_FNAME


def sign(checkpoint: Path) -> None:
    """The manifest that a stranger would write."""
    write_manifest(checkpoint, Manifest(1, 1, LAYOUT, hash_files(checkpoint, list_files(checkpoint))))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "iter_0000001"
    dcp.save({"w": torch.arange(6.0), "v": torch.zeros(3)}, checkpoint_id=path, no_dist=True)
    torch.save({}, path / "common.pt")
    for name in ("config.json", "progress.json"):
        (path / name).write_text("{}")
    sign(path)
    return path


def change(checkpoint: Path, action: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    action(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint)


def place(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


def test_a_good_one(checkpoint: Path) -> None:
    manifest, problems = find_problems(checkpoint)
    assert manifest is not None
    assert problems == []
    assert list(large_files(manifest)) == ["__0_0.distcp"]


@pytest.mark.parametrize("name", [".metadata", "common.pt", "config.json", "progress.json"])
def test_files_that_are_needed_are_listed(checkpoint: Path, name: str) -> None:
    files = hash_files(checkpoint, set(list_files(checkpoint)) - {name})
    write_manifest(checkpoint, Manifest(1, 1, LAYOUT, files))
    assert find_problems(checkpoint)[1] == [f"its manifest does not list {name}"]


def test_an_empty_list_is_not_a_checkpoint(checkpoint: Path) -> None:
    write_manifest(checkpoint, Manifest(1, 1, LAYOUT, {}))
    assert len(find_problems(checkpoint)[1]) == 5


@pytest.mark.parametrize("name", ["__7_0.distcp", "scheduler.json", "rng/rank_00000.safetensors"])
def test_files_that_may_be_used_are_listed(checkpoint: Path, name: str) -> None:
    (checkpoint / "rng").mkdir()
    (checkpoint / name).write_text("{}")
    assert find_problems(checkpoint)[1] == [f"its manifest does not list {name}"]


def test_other_files_do_not_matter(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("the good one")
    assert find_problems(checkpoint)[1] == []


@pytest.mark.parametrize("name", [".metadata", "common.pt", "config.json", "progress.json"])
def test_small_files_are_always_hashed(checkpoint: Path, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)
    assert find_problems(checkpoint)[1] == [f"{name} has changed (sha256 differs)"]


@pytest.mark.parametrize("content", [DEEP, b"[]", b"{", b'{"a": 1' + b"9" * 5000 + b"}"])
def test_settings_that_are_no_object_are_found_before_they_are_used(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "progress.json").write_bytes(content)
    sign(checkpoint)
    (problem,) = find_problems(checkpoint)[1]
    assert str(checkpoint / "progress.json") in problem


def move_all(metadata: Metadata) -> None:
    for part in metadata.storage_data.values():
        part.relative_path = "other"


def test_a_table_of_contents_that_names_what_is_not_listed(checkpoint: Path) -> None:
    os.rename(checkpoint / "__0_0.distcp", checkpoint / "other")
    change(checkpoint, move_all)
    files = hash_files(checkpoint, set(list_files(checkpoint)) - {"other"})
    write_manifest(checkpoint, Manifest(1, 1, LAYOUT, files))
    assert find_problems(checkpoint)[1] == ["its manifest does not list other"]


@pytest.mark.parametrize("name", ["../w", "/etc/passwd", "a/b", "..", "", 3, "\0"])
def test_a_table_of_contents_that_leaves_the_folder(checkpoint: Path, name: Any) -> None:
    change(checkpoint, lambda metadata: setattr(place(metadata), "relative_path", name))
    (problem,) = find_problems(checkpoint)[1]
    assert "only files of the same folder are read" in problem


def overlap(metadata: Metadata) -> None:
    first, second = metadata.storage_data.values()
    second.offset = first.offset


CONTENTS: dict[str, Callable[[Metadata], Any]] = {
    "beyond the file": lambda metadata: setattr(place(metadata), "length", 10**12),
    "before the file": lambda metadata: setattr(place(metadata), "offset", -1),
    "places that overlap": overlap,
    "larger than its place": lambda metadata: [
        setattr(metadata.state_dict_metadata["w"], "size", torch.Size([10**12])),
        setattr(metadata.state_dict_metadata["w"].chunks[0], "sizes", torch.Size([10**12])),
    ],
    "a chunk outside": lambda metadata: setattr(
        metadata.state_dict_metadata["w"].chunks[0], "offsets", torch.Size([1])
    ),
    "of other axes": lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", torch.Size([2, 3])),
    "no size": lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", [6]),
    "no chunks": lambda metadata: setattr(metadata.state_dict_metadata["w"], "chunks", None),
    "no properties": lambda metadata: setattr(metadata.state_dict_metadata["w"], "properties", None),
    "no tensor": lambda metadata: metadata.state_dict_metadata.update(w=3),
    "no name": lambda metadata: metadata.state_dict_metadata.update({3: None}),
    "no places": lambda metadata: setattr(metadata, "storage_data", None),
    "no tensors": lambda metadata: setattr(metadata, "state_dict_metadata", []),
    "compressed": lambda metadata: setattr(place(metadata), "transform_descriptors", ["zstd"]),
    "no place": lambda metadata: metadata.storage_data.update({"w": 3}),
}


@pytest.mark.parametrize("action", CONTENTS.values(), ids=CONTENTS)
def test_tables_of_contents_that_cannot_be(checkpoint: Path, action: Callable[[Metadata], Any]) -> None:
    change(checkpoint, action)
    (problem,) = find_problems(checkpoint)[1]
    assert problem.startswith(f"{checkpoint / '.metadata'} cannot be read: ")


def test_a_table_of_contents_is_what_torch_reads(checkpoint: Path) -> None:
    ours, torchs = read_contents(checkpoint), pickle.loads((checkpoint / ".metadata").read_bytes())
    assert ours.state_dict_metadata == torchs.state_dict_metadata
    assert ours.storage_data == torchs.storage_data


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json", "config.json", ".metadata"])
def test_what_is_no_file_hangs_nothing(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    problems = find_problems(checkpoint)[1]
    assert any(f"{name} is a FIFO; it must be a file" in problem for problem in problems) or problems == [
        f"its manifest does not list {name}"
    ]
    (info,) = list_checkpoints(checkpoint.parent)
    assert "a FIFO" in str(info.problem)


def test_a_pointer_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "latest")
    with pytest.raises(DamagedCheckpointError, match=r"latest cannot be read: .*is a FIFO"):
        read_pointer(tmp_path)


def test_files_may_be_links(checkpoint: Path, tmp_path: Path) -> None:
    """A user's own, as to another disk."""
    os.rename(checkpoint / "__0_0.distcp", tmp_path / "blob")
    (checkpoint / "__0_0.distcp").symlink_to(tmp_path / "blob")
    assert find_problems(checkpoint)[1] == []


def signed(content: dict[str, Any]) -> bytes:
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": "1"},
        {"sequence": None},
        {"iteration": -1},
        {"iteration": True},
        {"files": {"a": {"bytes": 1.5, "sha256": ""}}},
        {"files": {"a": {"bytes": 1, "sha256": 3}}},
        {"files": {"a": 3}},
        {"files": []},
        {"layout": {}},
        {"layout": 3},
        {"more": 1},
    ],
)
def test_manifests_with_values_that_cannot_be(checkpoint: Path, changes: dict[str, Any]) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text()) | changes
    content.pop("sha256")
    (checkpoint / "manifest.json").write_bytes(signed(content))
    manifest, problems = find_problems(checkpoint)
    assert manifest is None
    assert "manifest.json is damaged" in problems[0]
    assert len(list_checkpoints(checkpoint.parent)) == 1


def test_a_deep_manifest_is_damage(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(DEEP)
    assert find_problems(checkpoint) == (
        None,
        ["manifest.json cannot be read: it is nested too deep"],
    )
