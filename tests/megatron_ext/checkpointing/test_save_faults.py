"""Whatever happens in a save, the directory holds the last good checkpoint, and all ranks say the same."""

import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext import atomic
from megatron_ext.checkpointing import folders, manifest, writing
from megatron_ext.checkpointing.lock import FolderLock
from megatron_ext.checkpointing.owner import this_process
from tests.megatron_ext.checkpointing.killed_saves import BACKGROUND, PLACES
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks

SURVIVES_AS_2 = {"before the deletion", "in the deletion"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.megatron_ext.checkpointing.killed_saves",
        str(directory),
    ]
    result = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return directory


def _load_and_save_again(directory: Path) -> tuple[int, list[str], list[str]]:
    before = sorted(os.listdir(directory))
    run = Run(Case(), seed=99)
    loaded = run.load(directory)
    expected = torch.load(directory.parent / f"weights{loaded.iteration}.pt")
    assert all(torch.equal(expected[name], tensor) for name, tensor in run.weights().items())
    run.train(2 - loaded.iteration)
    final = torch.load(directory.parent / "weights2.pt")
    assert all(torch.equal(final[name], tensor) for name, tensor in run.weights().items())
    run.save(directory, 2, keep_last=1)
    assert run.load(directory).iteration == 2
    return loaded.iteration, before, sorted(os.listdir(directory))


@pytest.mark.parametrize("folder", [".", BACKGROUND])
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_save_leaves_the_last_good_checkpoint(killed: Path, place: str, folder: str) -> None:
    ((iteration, before, after),) = run_on_ranks(1, _load_and_save_again, killed / folder / place)
    assert iteration == (2 if place in SURVIVES_AS_2 else 1), before
    assert after == ["iter_0000002", "latest"], "the next save cleans up"


FULL = {
    "tensors of rank 1": "__1_0.distcp",
    "common part": ".common.pt.tmp",
    "random states of rank 1": ".rank_00001.safetensors.tmp",
    "settings": ".config.json.tmp",
    "manifest": ".manifest.json.tmp",
    "pointer": ".latest.tmp",
}


def _fill_disk(patch: pytest.MonkeyPatch, name: str) -> None:
    """A real full disk: where a file of this name is to be written, /dev/full is."""

    def open_or_full(path: Path, mode: str) -> Any:
        return open("/dev/full" if Path(path).name == name else path, mode)

    patch.setattr(atomic, "open", open_or_full, raising=False)
    plan_writing = writing.plan_writing

    def link_and_plan(ranks: Any, staging: Path, state: Any) -> Any:
        if name.endswith(".distcp"):  # torch opens it
            ranks.on_first("link", lambda: (staging / name).symlink_to("/dev/full"))
        return plan_writing(ranks, staging, state)

    patch.setattr(writing, "plan_writing", link_and_plan)


def _save_with_fault(directory: Path, fault: str, in_background: bool) -> tuple[str, str, list[str], bool]:
    run = Run(Case())
    run.save(directory, 1)
    with pytest.MonkeyPatch.context() as patch:
        _fill_disk(patch, FULL[fault])
        failure = _failure_of_save(run, directory, in_background=in_background)
    return (*failure, run.load(directory).iteration == 1)


def _failure_of_save(run: Run, directory: Path, **options: Any) -> tuple[str, str, list[str]]:
    """(type, message, what is left in the directory)."""
    try:
        run.save(directory, 2, **options)
    except Exception as error:
        dist.barrier()  # until rank 0 has cleaned up
        return type(error).__name__, str(error), sorted(os.listdir(directory)) if directory.is_dir() else []
    return "", "", []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("fault", FULL)
def test_a_full_disk_on_one_rank_is_one_clear_error_on_all(
    tmp_path: Path, fault: str, in_background: bool
) -> None:
    first, second = run_on_ranks(2, _save_with_fault, tmp_path, fault, in_background)
    assert first == second
    name, message, left, loadable = first
    assert name == "DiskFullError"
    assert message.startswith(f"checkpoint.save: no space for iter_0000002 in {tmp_path}: it takes about 0.")
    for part in (
        "MB are free",
        "Earlier checkpoints and 'latest' are as they were",
        "keep_last",
        "No space left on device",
    ):
        assert part in message
    if fault == "random states of rank 1":
        assert "(on rank 1)" in message
    assert [file for file in left if file.startswith(".iter")] == [], "the temporary folder is removed"
    assert (tmp_path / "latest").read_text() == "iter_0000001\n"
    assert loadable


def _save_too_much(directory: Path) -> tuple[str, str, list[str]]:
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders.shutil, "disk_usage", lambda path: usage(10**6, 9 * 10**5, 10**5))
        return _failure_of_save(Run(Case()), directory)


def test_what_will_not_fit_is_refused_before_writing(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _save_too_much, tmp_path)
    assert first == second
    name, message, left = first
    assert name == "DiskFullError"
    assert "0.1 MB are free" in message
    assert left == []


def _estimate_and_size(directory: Path, case: Case) -> tuple[int, int]:
    estimates: list[int] = []
    prepare_staging = folders.prepare_staging

    def spy(directory: Path, iteration: int, needed_bytes: int) -> Any:
        estimates.append(needed_bytes)
        return prepare_staging(directory, iteration, needed_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "prepare_staging", spy)
        path = Run(case).save(directory, 1)
    return (estimates or [0])[0], manifest.read_manifest(path).bytes


@pytest.mark.parametrize("hidden_size", [32, 256])
def test_the_estimate_is_enough_and_not_too_much(tmp_path: Path, hidden_size: int) -> None:
    needed, size = run_on_ranks(2, _estimate_and_size, tmp_path, Case(hidden_size=hidden_size))[0]
    assert size < needed
    if hidden_size == 256:
        assert needed < 1.1 * size


def _save_into(directory: Path) -> tuple[str, str, list[str]]:
    return _failure_of_save(Run(Case()), directory)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_on_ranks(2, _save_into, tmp_path / "file" / "checkpoints")
    assert first == second
    assert first[0] == "UnwritableFolderError"
    assert f"checkpoint.save: {tmp_path / 'file'}/checkpoints cannot be written: Not a directory" in first[1]


def test_a_folder_that_another_run_writes_into_is_left_alone(tmp_path: Path) -> None:
    """This process, the parent of both ranks, holds it."""
    lock = FolderLock(tmp_path)
    lock.take()
    (tmp_path / f".iter_0000001.{this_process().token}.tmp").mkdir()
    first, second = run_on_ranks(2, _save_into, tmp_path)
    lock.release()
    assert first == second
    assert first[0] == "FolderInUseError"
    assert f"is in use by process {os.getpid()}" in first[1]
    assert first[2] == [f".iter_0000001.{this_process().token}.tmp", "lock.json"]


def _save_and_lose_the_folder(directory: Path) -> tuple[str, str, list[str]]:
    write_manifest = writing.write_manifest

    def lose_it(*args: Any) -> None:
        other = replace(this_process(), pid=os.getppid(), started=start_of(os.getppid()))
        (directory / "lock.json").write_bytes(other.to_json())
        write_manifest(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_manifest", lose_it)
        return _failure_of_save(Run(Case()), directory)


def test_a_folder_that_is_lost_in_a_save_gets_no_checkpoint(tmp_path: Path) -> None:
    ((name, message, left),) = run_on_ranks(1, _save_and_lose_the_folder, tmp_path)
    assert name == "FolderInUseError"
    assert "choose another checkpoint.save" in message
    assert left == ["lock.json"]


def start_of(pid: int) -> int:
    """Start of a process in clock ticks after the boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _save_where_rank_1_does_not_look(directory: Path) -> tuple[str, str, list[str]]:
    run = Run(Case())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(Path, "is_dir", lambda self: False)
        return _failure_of_save(run, directory)


def test_a_directory_that_is_not_shared_is_an_error(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _save_where_rank_1_does_not_look, tmp_path)
    assert first == second
    name, message, left = first
    assert name == "CheckpointError"
    assert "rank 1 does not see" in message
    assert "file system that all nodes share" in message
    assert left == []


def _save_what_json_cannot_hold(directory: Path) -> tuple[str, str, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "config", {"bad": object()})
        return _failure_of_save(Run(Case()), directory)


def test_a_bug_on_one_rank_is_raised_on_all_with_its_traceback(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _save_what_json_cannot_hold, tmp_path)
    assert first == second
    name, message, left = first
    assert name == "RuntimeError"
    assert "collect the run's settings" in message
    assert "Traceback" in message
    assert left == []
