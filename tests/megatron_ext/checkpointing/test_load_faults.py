"""Damage to the newest checkpoint: loading falls back to the last good one and says why."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpointing import folders
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run
from tests.ranks import run_on_ranks

RANKS = 2


def _save(directory: Path) -> None:
    run = Run(Case())
    for iteration in (1, 2):
        run.train(1)
        run.save(directory, iteration)
        torch.save(run.weights(), directory / f"weights{iteration}.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_on_ranks(RANKS, _save, directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _load(path: Path, options: dict[str, Any]) -> tuple[str, str, int]:
    """(error type or "", message or log, iteration)."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ext").addHandler(handler)
    try:
        run = Run(Case(), seed=99)
        loaded = run.load(path, **options)
        folder = path.parent if path.name.startswith("iter_") else path
        expected = torch.load(folder / f"weights{loaded.iteration}.pt")
        assert all(torch.equal(expected[name], tensor) for name, tensor in run.weights().items())
        assert loaded.progress["consumed_samples"] == 4 * loaded.iteration
        return "", "\n".join(lines), loaded.iteration
    except ValueError as error:
        return type(error).__name__, str(error), 0
    finally:
        logging.getLogger("megatron_ext").removeHandler(handler)


def load(path: Path, **options: Any) -> tuple[str, str, int]:
    results = run_on_ranks(RANKS, _load, path, options)
    assert {result[2] for result in results} == {results[0][2]}
    if results[0][0]:
        assert results[0] == results[1], "all ranks raise the same error"
    else:
        assert results[1][1] == "", "one rank warns"
    return results[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("__1_0.distcp", truncate, "bytes instead of"),
    ("__0_0.distcp", flip_a_bit, "__0_0.distcp has changed (sha256 differs)"),
    ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    (".metadata", Path.unlink, ".metadata is missing"),
    ("common.pt", flip_a_bit, "common.pt has changed"),
    ("config.json", flip_a_bit, "config.json has changed"),
    ("rng/rank_00001.safetensors", flip_a_bit, "rng/rank_00001.safetensors has changed"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", truncate, "manifest.json cannot be read"),
    ("manifest.json", flip_a_bit, "manifest.json"),
]


@pytest.mark.parametrize(
    ("name", "damage", "reason"), DAMAGES, ids=[f"{d.__name__}-{n}" for n, d, _ in DAMAGES]
)
def test_damage_falls_back_with_a_reason(
    directory: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    damage(directory / "iter_0000002" / name)
    error, log, iteration = load(directory)
    assert (error, iteration) == ("", 1)
    assert f"{directory / 'iter_0000002'} is damaged: " in log
    assert reason in log
    assert f"Falling back to {directory / 'iter_0000001'} (iteration 1)" in log


def test_nothing_wrong_no_warning(directory: Path) -> None:
    assert load(directory) == ("", "", 2)
    assert load(directory / "iter_0000001") == ("", "", 1)


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(directory: Path) -> None:
    (directory / "iter_0000002" / "__0_0.distcp").unlink()
    error, message, _ = load(directory / "iter_0000002")
    assert error == "DamagedCheckpointError"
    assert message.startswith(
        f"checkpoint.load: {directory / 'iter_0000002'} is damaged: __0_0.distcp is missing. Load another"
    )


def test_no_good_checkpoint_lists_what_was_tried(directory: Path) -> None:
    flip_a_bit(directory / "iter_0000002" / "common.pt")
    (directory / "iter_0000001" / "manifest.json").unlink()
    (directory / "latest").write_text("nonsense")
    error, message, _ = load(directory)
    assert error == "DamagedCheckpointError"
    assert message.splitlines() == [
        f"checkpoint.load: no good checkpoint in {directory}; tried:",
        "  latest holds 'nonsense', which is not the name of a checkpoint",
        (
            f"  {directory / 'iter_0000001'} is damaged: manifest.json is missing: saving did not finish, or "
            "it was deleted"
        ),
        f"  {directory / 'iter_0000002'} is damaged: common.pt has changed (sha256 differs)",
    ]


@pytest.mark.parametrize("pointer", [b"nonsense", b"iter_0000007", b"\xff\xfe"])
def test_a_wrong_pointer_means_the_newest(directory: Path, pointer: bytes) -> None:
    (directory / "latest").write_bytes(pointer)
    error, log, iteration = load(directory)
    assert (error, iteration) == ("", 2)
    assert "checkpoint.load: latest " in log


def test_without_a_pointer_the_newest_is_taken(directory: Path) -> None:
    (directory / "latest").unlink()
    assert load(directory) == ("", "", 2)


def test_the_pointer_decides(directory: Path) -> None:
    folders.write_pointer(directory, "iter_0000001")
    assert load(directory) == ("", "", 1)


def test_hashes_of_large_files_may_be_left_out_but_not_sizes(directory: Path) -> None:
    flip_a_bit(directory / "iter_0000002" / "rng" / "rank_00000.safetensors")  # small files are always hashed
    large = directory / "iter_0000001" / "__0_0.distcp"
    large.write_bytes(large.read_bytes().replace(b"ZZZZ", b"YYYY", 1))  # padding
    assert load(directory, verify_hashes=False)[2] == 1
    assert load(directory)[0] == "DamagedCheckpointError"
    truncate(large)
    assert load(directory, verify_hashes=False)[0] == "DamagedCheckpointError"


def test_json_that_is_damaged_is_passed_over(directory: Path) -> None:
    path = directory / "iter_0000002" / "progress.json"
    path.write_bytes(b"[" * path.stat().st_size)
    error, log, iteration = load(directory, verify_hashes=False)
    assert (error, iteration) == ("", 1)
    assert "is damaged: progress.json has changed" in log


def test_no_checkpoint(tmp_path: Path) -> None:
    error, message, _ = load(tmp_path / "absent")
    assert error == "NoCheckpointError"
    assert "absent is not a directory that exists" in message
