"""Atomic files: the old content or the new one, and nothing left behind."""

import os
from pathlib import Path

import pytest

from megatron_ext import atomic


def test_write_replaces(tmp_path: Path) -> None:
    atomic.write_file(tmp_path / "a", b"one")
    atomic.write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.write_file(tmp_path / "a", b"one")

    def fail(descriptor: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        atomic.write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_file_and_directory_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename, fsync = os.rename, os.fsync

    def spy_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    def spy_fsync(descriptor: int) -> None:
        events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", spy_rename)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    atomic.write_file(tmp_path / "a", b"one")
    assert events == ["sync .a.tmp", "rename", f"sync {tmp_path.name}"]


def test_remove_tree_renames_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    seen: list[list[str]] = []
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path: seen.append(os.listdir(tmp_path)))
    atomic.remove_tree(tmp_path / "a", tmp_path / ".a.trash")
    assert seen == [[".a.trash"]]
