"""The manifest: round trip, damage, and how ranks share files."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.checkpointing.errors import DamagedCheckpointError
from megatron_ext.checkpointing.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Layout,
    Manifest,
    find_wrong_hashes,
    find_wrong_sizes,
    hash_files,
    list_files,
    read_manifest,
    share_of_rank,
    write_manifest,
)

LAYOUT = Layout(device="cpu", world_size=4, tensor=2, pipeline=1, context=1, data=2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "rng").mkdir()
    (tmp_path / "a.bin").write_bytes(b"a" * 1000)
    (tmp_path / ".metadata").write_bytes(b"contents")
    (tmp_path / "rng" / "0").write_bytes(b"")
    write_manifest(tmp_path, Manifest(3, 1, LAYOUT, hash_files(tmp_path, list_files(tmp_path))))
    return tmp_path


def test_round_trip(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert list(manifest.files) == [".metadata", "a.bin", "rng/0"]
    assert manifest.files["rng/0"] == FileEntry(
        0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    assert (manifest.iteration, manifest.sequence, manifest.layout, manifest.bytes) == (3, 1, LAYOUT, 1008)
    assert find_wrong_sizes(checkpoint, manifest) == []
    assert find_wrong_hashes(checkpoint, manifest, manifest.files) == []


def test_damage_is_described(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    (checkpoint / ".metadata").write_bytes(b"contentS")
    assert find_wrong_hashes(checkpoint, manifest, manifest.files) == [
        ".metadata has changed (sha256 differs)"
    ]
    (checkpoint / "a.bin").write_bytes(b"a" * 999)
    (checkpoint / "rng" / "0").unlink()
    assert find_wrong_sizes(checkpoint, manifest) == [
        "a.bin has 999 bytes instead of 1,000",
        "rng/0 is missing",
    ]
    (problem,) = find_wrong_hashes(checkpoint, manifest, ["rng/0"])
    assert problem.startswith("reading fails: ")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_manifest_is_found(checkpoint: Path, place: float, bit: int) -> None:
    path = checkpoint / MANIFEST_NAME
    before, manifest = path.read_bytes(), read_manifest(checkpoint)
    damaged = bytearray(before)
    damaged[int(place * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        unharmed = (
            read_manifest(checkpoint) == manifest
        )  # only what does not change the content may pass: white space
    except DamagedCheckpointError as error:
        unharmed = MANIFEST_NAME in str(error)
    path.write_bytes(before)
    assert unharmed


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "manifest.json is missing: saving did not finish, or it was deleted"),
        ("", "manifest.json cannot be read"),
        ("[]", "manifest.json is damaged"),
        ("{}", "manifest.json is damaged"),
        ('{"schema_version": 2, "sha256": ""}', "schema version 2; this program reads version 1"),
        ('{"schema_version": 1, "sha256": "00"}', "its own hash does not fit its content"),
    ],
)
def test_unreadable_manifests_say_why(checkpoint: Path, content: str | None, reason: str) -> None:
    path = checkpoint / MANIFEST_NAME
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DamagedCheckpointError, match=reason):
        read_manifest(checkpoint)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd"])
def test_files_outside_are_refused(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, Manifest(3, 1, LAYOUT, {name: FileEntry(1, "")}))
    with pytest.raises(DamagedCheckpointError, match="outside of the checkpoint"):
        read_manifest(tmp_path)


def test_manifest_is_plain_json_with_a_version(checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST_NAME).read_text())
    assert content["schema_version"] == 1
    assert content["layout"] == dataclasses.asdict(LAYOUT)


@given(
    sizes=st.dictionaries(st.text(min_size=1), st.integers(0, 10**12), max_size=40),
    world_size=st.integers(1, 9),
)
def test_ranks_share_all_files_fairly(sizes: dict[str, int], world_size: int) -> None:
    shares = [share_of_rank(sizes, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
