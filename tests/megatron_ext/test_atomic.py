"""Atomic files: the old content or the new one, and nothing left behind."""

import os
from collections.abc import Callable
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


def _make_file(path: Path) -> None:
    path.write_bytes(b"old")


def _make_folder(path: Path) -> None:
    (path / "below").mkdir(parents=True)


def _make_link(path: Path) -> None:
    path.with_name("others").mkdir()
    (path.with_name("others") / "file").touch()
    path.symlink_to("others")


def _make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


KINDS = [_make_file, _make_folder, _make_link, _make_dangling_link, _make_fifo]


@pytest.mark.parametrize("make", KINDS)
def test_whatever_has_the_name_is_deleted_and_links_are_not_followed(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "a")
    atomic.remove_entry(tmp_path / "a")
    assert os.listdir(tmp_path) == (["others"] if make is _make_link else [])
    assert make is not _make_link or (tmp_path / "others" / "file").exists()
    atomic.remove_entry(tmp_path / "a")


@pytest.mark.parametrize("make", KINDS)
def test_a_write_goes_into_its_file_only(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / ".a.tmp")
    atomic.write_file(tmp_path / "a", b"new")
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert set(os.listdir(tmp_path)) <= {"a", "others"}


def test_what_cannot_be_discarded_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise PermissionError("not yours")

    (tmp_path / "a").mkdir()
    monkeypatch.setattr(atomic.shutil, "rmtree", fail)
    atomic.discard(tmp_path / "a")
    assert f"{tmp_path / 'a'} could not be deleted: not yours" in caplog.text
