"""A directory of checkpoints: order, pointer, publication, and what is deleted when."""

import logging
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext import atomic
from megatron_ext.checkpointing import folders
from megatron_ext.checkpointing.errors import DamagedCheckpointError, DiskFullError, NoCheckpointError
from megatron_ext.checkpointing.folders import (
    find_candidates,
    list_checkpoints,
    prepare_staging,
    publish,
    read_pointer,
    remove_old,
)
from megatron_ext.checkpointing.manifest import MANIFEST_NAME, Layout, Manifest, hash_files, write_manifest
from megatron_ext.checkpointing.owner import this_process

LAYOUT = Layout(device="cpu", world_size=1, tensor=1, pipeline=1, context=1, data=1)


def save(directory: Path, iteration: int, content: bytes = b"x") -> Path:
    staging, sequence = prepare_staging(directory, iteration, needed_bytes=0)
    (staging / "file").write_bytes(content)
    write_manifest(staging, Manifest(iteration, sequence, LAYOUT, hash_files(staging, ["file"])))
    return publish(staging, iteration)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_published_checkpoints_are_listed_in_order_of_saving(tmp_path: Path) -> None:
    for iteration in (5, 12345678, 3):
        save(tmp_path / "new" / "directory", iteration)
    infos = list_checkpoints(tmp_path / "new" / "directory")
    assert [info.path.name for info in infos] == ["iter_0000005", "iter_12345678", "iter_0000003"]
    assert [(info.iteration, info.problem) for info in infos] == [(5, None), (12345678, None), (3, None)]
    assert (tmp_path / "new" / "directory" / "latest").read_text() == "iter_0000003\n"


def test_listing_nothing(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "absent") == []


def test_damaged_checkpoints_are_listed_last_with_their_problem(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000001" / MANIFEST_NAME).unlink()
    (tmp_path / "iter_0000002" / "file").unlink()
    infos = list_checkpoints(tmp_path)
    assert [info.iteration for info in infos] == [2, 3, 1]
    assert infos[0].problem == "file is missing"
    assert infos[1].problem is None
    assert "manifest.json is missing" in (infos[2].problem or "")


def test_candidates_are_the_pointer_and_then_the_newest_first(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    folders.write_pointer(tmp_path, "iter_0000002")
    candidates = find_candidates(tmp_path)
    assert [path.name for path in candidates.checkpoints] == ["iter_0000002", "iter_0000003", "iter_0000001"]
    assert candidates.may_fall_back
    assert candidates.pointer_problem is None


def test_one_checkpoint_by_name_has_no_fallback(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)
    candidates = find_candidates(tmp_path / "iter_0000001")
    assert [path.name for path in candidates.checkpoints] == ["iter_0000001"]
    assert not candidates.may_fall_back
    renamed = tmp_path / "best"
    (tmp_path / "iter_0000001").rename(renamed)
    assert find_candidates(renamed).checkpoints == (renamed,)
    (tmp_path / "iter_0000002" / MANIFEST_NAME).unlink()
    assert not find_candidates(tmp_path / "iter_0000002").may_fall_back


@pytest.mark.parametrize(
    ("pointer", "problem"),
    [
        (b"iter_0000009\n", "latest names iter_0000009, which is not there"),
        (b"\xff\x00 garbage", "which is not the name of a checkpoint"),
        (b"", "latest holds '', which is not"),
        (b"../../iter_0000001", "which is not the name of a checkpoint"),
    ],
)
def test_a_wrong_pointer_is_reported_and_the_newest_taken(
    tmp_path: Path, pointer: bytes, problem: str
) -> None:
    for iteration in (2, 1):
        save(tmp_path, iteration)
    (tmp_path / "latest").write_bytes(pointer)
    candidates = find_candidates(tmp_path)
    assert [path.name for path in candidates.checkpoints] == ["iter_0000001", "iter_0000002"]
    assert problem in (candidates.pointer_problem or "")


def test_an_absent_pointer_is_no_problem(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    assert find_candidates(tmp_path).pointer_problem is None


def test_an_unreadable_pointer_is_damage(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(DamagedCheckpointError, match="latest cannot be read"):
        read_pointer(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        NoCheckpointError, match=r"checkpoint\.load: .*absent is not a directory that exists; give"
    ):
        find_candidates(tmp_path / "absent")
    (tmp_path / "iter_x").mkdir()
    with pytest.raises(NoCheckpointError, match="holds no checkpoint"):
        find_candidates(tmp_path)


def test_keep_last_deletes_the_oldest(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration)
    remove_old(tmp_path, 2)
    assert names(tmp_path) == ["iter_0000003", "iter_0000004", "latest"]
    remove_old(tmp_path, None)
    assert len(names(tmp_path)) == 3


def test_oldest_is_by_order_of_saving_not_by_iteration(tmp_path: Path) -> None:
    """A run that starts again in the directory of an older, longer one must not lose its own checkpoints."""
    for iteration in (1000, 2000, 100, 200):
        save(tmp_path, iteration)
    remove_old(tmp_path, 2)
    assert names(tmp_path) == ["iter_0000100", "iter_0000200", "latest"]


def test_the_pointed_to_and_the_unreadable_are_not_deleted(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000002" / MANIFEST_NAME).unlink()
    folders.write_pointer(tmp_path, "iter_0000001")
    remove_old(tmp_path, 1)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002", "iter_0000004", "latest"]


def test_a_deletion_that_fails_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)

    def fail(path: Path) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(atomic.shutil, "rmtree", fail)
    remove_old(tmp_path, 1)
    assert ".trash could not be deleted: not yours" in caplog.text
    assert [info.iteration for info in list_checkpoints(tmp_path)] == [2]


def test_the_same_iteration_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1, b"old")
    path = save(tmp_path, 1, b"new")
    assert (path / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["iter_0000001", "iter_0000001.replaced", "latest"]
    save(tmp_path, 1, b"newer")
    remove_old(tmp_path, None)
    assert names(tmp_path) == ["iter_0000001", "latest"]
    assert (path / "file").read_bytes() == b"newer"


def test_a_crash_between_the_renames_of_a_replacement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, b"old")

    def crash(source: Path, target: Path) -> None:
        if source.name.endswith(".tmp") and source.is_dir():
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(atomic, "move", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, b"new")
    candidates = find_candidates(tmp_path)
    assert [path.name for path in candidates.checkpoints] == ["iter_0000001.replaced"]
    assert candidates.pointer_problem == "latest names iter_0000001, which is not there"
    assert (candidates.checkpoints[0] / "file").read_bytes() == b"old"


def test_leftovers_are_removed_with_a_log_line_and_never_candidates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / ".iter_0000002.tmp")
    shutil.copytree(tmp_path / "iter_0000001", tmp_path / ".iter_0000000.trash")
    assert [path.name for path in find_candidates(tmp_path).checkpoints] == ["iter_0000001"]
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 3)
    assert names(tmp_path) == ["iter_0000001", "iter_0000003", "latest"]
    assert caplog.text.count("left by a save that did not finish") == 2


def test_a_checkpoint_that_will_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2_500_000))
    message = r"no space for iter_0000002 in .*: it takes about 3\.0 MB, 2\.5 MB are free.*keep_last"
    with pytest.raises(DiskFullError, match=message):
        prepare_staging(tmp_path, 2, needed_bytes=3_000_000)
    assert names(tmp_path) == ["iter_0000001", "latest"]


def _make_file(path: Path) -> None:
    path.write_bytes(b"x")


def _make_folder(path: Path) -> None:
    (path / "below").mkdir(parents=True)
    (path / "below" / "file").touch()


def _make_link(path: Path) -> None:
    path.symlink_to(path.parent.with_name("others"))


def _make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


OUR_NAMES = [
    "iter_0000002",
    "iter_0000002.replaced",
    "iter_0000001.replaced",
    ".iter_0000002.tmp",
    ".iter_0000001.trash",
    ".iter_0000009.node7-12-345.tmp",
    ".iter_0000002.{token}.tmp",
    ".iter_0000001.{token}.trash",
    ".iter_0000001.{token}.1.trash",
    ".latest.tmp",
    "latest",
]


@pytest.mark.parametrize("name", OUR_NAMES)
@pytest.mark.parametrize("make", [_make_file, _make_folder, _make_link, _make_dangling_link, _make_fifo])
def test_whatever_has_one_of_our_names_a_save_succeeds(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    others, directory = tmp_path / "others", tmp_path / "save"
    others.mkdir()
    (others / "file").touch()
    save(directory, 1)
    path = directory / name.format(token=this_process().token)
    atomic.discard(path)
    make(path)
    for iteration in (2, 2, 3):
        save(directory, iteration)
        remove_old(directory, 1)
    assert (others / "file").exists(), "links are not followed"
    candidates = find_candidates(directory)
    assert candidates.checkpoints[0] == directory / "iter_0000003"
    assert candidates.pointer_problem is None or (name == "latest" and make is _make_folder)
    hidden = [entry for entry in names(directory) if entry.startswith(".")]
    assert hidden == [], "leftovers are removed"


@pytest.mark.parametrize("name", [name for name in OUR_NAMES if name.startswith(".iter")])
def test_a_leftover_that_cannot_be_deleted_is_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    save(tmp_path, 1)
    path = tmp_path / name.format(token=this_process().token)
    path.mkdir()
    rmtree = atomic.shutil.rmtree

    def fail_there(other: Path) -> None:
        if other == path:
            raise PermissionError("not yours")
        rmtree(other)

    monkeypatch.setattr(atomic.shutil, "rmtree", fail_there)
    save(tmp_path, 2)
    remove_old(tmp_path, 1)
    assert names(tmp_path) == [path.name, "iter_0000002", "latest"]
    assert f"{path} could not be deleted: not yours" in caplog.text


@pytest.mark.parametrize("name", [".iter_notes.tmp", ".iter_2.tmp", ".iter_0000002.mine.tmp", "iter_2.tmp"])
def test_what_only_looks_like_ours_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    save(tmp_path, 1)
    assert name in names(tmp_path)


def test_the_temporary_folder_of_a_living_process_stays(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        start = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19]
        token = replace(this_process(), pid=sleeper.pid, started=int(start)).token
        path = tmp_path / f".iter_0000002.{token}.tmp"
        path.mkdir()
        save(tmp_path, 1)
        assert path.exists()
    finally:
        sleeper.communicate(b"\n")
    save(tmp_path, 2)
    assert not path.exists()


def test_old_checkpoints_that_cannot_be_listed_are_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)
    (tmp_path / "latest").write_bytes(b"nonsense")
    remove_old(tmp_path, 1)
    remove_old(tmp_path / "absent", 1)
    assert caplog.text.count("are not deleted") == 2
    assert "iter_0000001" in names(tmp_path)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("config.json", "lckv-megatron convert hf-to-megatron --hf-path"),
        ("mp_rank_00/model_optim_rng.pt", "lckv-megatron convert legacy-to-megatron --legacy-path"),
    ],
)
def test_a_model_of_another_format_names_its_converter(tmp_path: Path, file: str, command: str) -> None:
    path = tmp_path / "iter_0000100" / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(NoCheckpointError, match=rf"checkpoint\.load: .*: {command} {tmp_path}/iter_0000100 "):
        find_candidates(tmp_path / "iter_0000100")
