"""A save in the background is the save at its moment, whatever the run does meanwhile; all ranks agree when
it has become a checkpoint, and on what went wrong."""

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpointing import shards, writing
from megatron_ext.checkpointing.save import Saves, saves
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks

_OF_THE_RUN = (".distcp", "common.pt", "scheduler.json", "progress.json", ".safetensors")


def _hashes(checkpoint: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in checkpoint.rglob("*")
        if path.name.endswith(_OF_THE_RUN)
    }


def _save(case: Case, directory: Path, options: dict[str, Any]) -> tuple[list[float], dict[str, str]]:
    """Trains on before the save can have ended."""
    run = Run(case)
    run.train(2)
    may_write = threading.Event()
    write_state = writing.write_state

    def held(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write_state(*arguments)

    with pytest.MonkeyPatch.context() as patch, saves(directory, **options) as made:
        if options.get("in_background"):
            patch.setattr(writing, "write_state", held)
        made.save(2, run.state(2))
        losses = run.train(3)
        may_write.set()
    dist.barrier()
    return losses, _hashes(directory / "iter_0000002")


def _resume(case: Case, directory: Path) -> list[float]:
    run = Run(case, seed=99)
    run.train(1)
    assert run.load(directory).iteration == 2
    return run.train(3)


@pytest.mark.parametrize("sharding", ["fully_reshardable", "dp_reshardable"])
@pytest.mark.parametrize(
    "case", [Case(bf16=True, overlap=True), Case(distributed_optimizer=False), Case(tp=2, bf16=True)], ids=str
)
def test_a_save_in_the_background_is_that_of_its_moment(tmp_path: Path, case: Case, sharding: str) -> None:
    options = {"sharding": sharding}
    at_once = run_on_ranks(2, _save, case, tmp_path / "at once", options)
    beside = run_on_ranks(2, _save, case, tmp_path / "beside", {**options, "in_background": True})
    assert beside == at_once
    assert run_on_ranks(2, _resume, case, tmp_path / "beside") == [losses for losses, _ in at_once]


def _settled(directory: Path) -> list[tuple[bool, bool]]:
    """(in flight, is a checkpoint) after each boundary, while rank 1 is slow."""
    run = Run(Case())
    may_write = threading.Event()
    write_state = writing.write_state

    def slow(save: Any, rank: int) -> Any:
        assert rank == 0 or may_write.wait(60)
        return write_state(save, rank)

    seen = []
    with pytest.MonkeyPatch.context() as patch, saves(directory, in_background=True) as made:
        patch.setattr(writing, "write_state", slow)

        def look() -> None:
            dist.barrier()
            seen.append((made.in_flight, (directory / "iter_0000001").is_dir()))

        made.save(1, run.state(1))
        for _ in range(2):
            made.settle()
            look()
        may_write.set()
        _wait_for_writers(made)
        made.settle()
        look()
        assert made.stalled_seconds() > 0
        assert made.stalled_seconds() == 0
    return seen


def _wait_for_writers(made: Saves) -> None:
    assert made._flight is not None
    made._flight.written.exception(60)
    dist.barrier()


def test_it_is_a_checkpoint_at_the_first_boundary_when_all_ranks_have_written(tmp_path: Path) -> None:
    waiting, done = (True, False), (False, True)
    assert run_on_ranks(2, _settled, tmp_path) == [[waiting, waiting, done]] * 2


def _save_often(directory: Path) -> tuple[int, list[str], int]:
    groups, new_group = 0, dist.new_group

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal groups
        groups += 1
        return new_group(*arguments, **options)

    run, writers = Run(Case()), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", count)
        with saves(directory, in_background=True, keep_last=2) as made:
            for iteration in (1, 2, 3):
                made.save(iteration, run.state(iteration))
                writers = max(
                    writers, sum(thread.name == "checkpoint writer" for thread in threading.enumerate())
                )
    dist.barrier()
    return groups, sorted(os.listdir(directory)), writers


def test_the_next_save_waits_and_process_groups_are_made_once(tmp_path: Path) -> None:
    expected = (1, ["iter_0000002", "iter_0000003", "latest"], 1)
    assert run_on_ranks(2, _save_often, tmp_path) == [expected] * 2


def _fail_on_one_rank(directory: Path) -> tuple[str, str, list[str]]:
    run = Run(Case())
    write_state = writing.write_state

    def fail(save: Any, rank: int) -> Any:
        if rank == 1:
            raise PermissionError(13, "Permission denied", "/some/file")
        return write_state(save, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_state", fail)
        try:
            with saves(directory, in_background=True) as made:
                made.save(1, run.state(1))
                _wait_for_writers(made)
                made.settle()
                raise AssertionError("the boundary must raise")
        except ValueError as error:
            dist.barrier()
            return type(error).__name__, str(error), os.listdir(directory)
    raise AssertionError("unreachable")


def test_an_error_of_a_writer_is_raised_on_all_ranks_at_the_next_boundary(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, _fail_on_one_rank, tmp_path)
    assert first == second
    message = "write files (on rank 1): PermissionError: [Errno 13] Permission denied: '/some/file'"
    assert first == ("CheckpointError", message, [])


def _fail_beside(directory: Path) -> list[str]:
    run = Run(Case())
    try:
        with saves(directory, in_background=True) as made:
            made.save(1, run.state(1))
            raise KeyError("of this rank alone: no agreement is possible")
    except KeyError:
        return os.listdir(directory)


def test_an_error_of_the_run_leaves_nothing_of_a_save_in_flight(tmp_path: Path) -> None:
    assert run_on_ranks(1, _fail_beside, tmp_path) == [[]]


def _copies(directory: Path) -> tuple[list[int], int]:
    """(bytes of the copies of each of two saves that are new, size of this rank's file)."""
    new, copy = [0, 0], shards._copied

    def count(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        made = copy(tensor, memory)
        new[number] += made.untyped_storage().nbytes() if made is not memory else 0
        return made

    run = Run(Case(bf16=True, hidden_size=256))
    with pytest.MonkeyPatch.context() as patch, saves(directory, in_background=True) as made:
        patch.setattr(shards, "_copied", count)
        for number in (0, 1):
            made.save(1 + number, run.state(1 + number))
    return new, (directory / "iter_0000002" / f"__{dist.get_rank()}_0.distcp").stat().st_size


def test_the_copy_is_as_large_as_the_file_and_is_made_once(tmp_path: Path) -> None:
    for (first, second), size in run_on_ranks(2, _copies, tmp_path):
        assert 0.9 * size < first < size
        assert second == 0


def _load_on_another_layout(directory: Path) -> str:
    try:
        Run(Case()).load(directory)
    except ValueError as error:
        return str(error)
    return ""


def _save_in_buckets(directory: Path) -> None:
    Run(Case()).save(directory, 1, sharding="dp_reshardable")


def test_buckets_of_another_layout_are_refused_by_name(tmp_path: Path) -> None:
    run_on_ranks(2, _save_in_buckets, tmp_path)
    (message,) = run_on_ranks(1, _load_on_another_layout, tmp_path)
    assert "saved by 2 cpu rank(s) (TP 1, PP 1, CP 1, DP 2) with checkpoint.optimizer_sharding" in message
    assert "dp_reshardable, which can be loaded by the same layout only; this run has 1 cpu" in message
    assert "save once there with fully_reshardable, or set checkpoint.finetune" in message


def _finetune(directory: Path) -> bool:
    run = Run(Case(), seed=99)
    run.load(directory, finetune=True)
    return True


def test_weights_beside_buckets_can_be_taken_on_any_layout(tmp_path: Path) -> None:
    run_on_ranks(2, _save_in_buckets, tmp_path)
    assert run_on_ranks(1, _finetune, tmp_path) == [True]


def test_a_thread_that_cannot_end_keeps_no_process_alive() -> None:
    """The writer is a daemon: a process that is to end does not wait for a dead file server."""
    from megatron_ext.checkpointing.save import _in_background

    _in_background(lambda: time.sleep(1))  # type: ignore[arg-type, return-value]
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint writer")
