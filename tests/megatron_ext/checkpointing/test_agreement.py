"""Ranks agree on the outcome of each step, and a missing rank has a name and a time-out."""

import errno
import time
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpointing.agreement import Agreement, agreement
from megatron_ext.checkpointing.errors import (
    CheckpointError,
    DiskFullError,
    MismatchError,
    MissingRanksError,
    disk_full_in,
)
from megatron_ext.errors import ConfigError
from tests.ranks import run_on_ranks

FAILURES: dict[str, dict[int, BaseException]] = {
    "user": {1: MismatchError("field x: 1 given")},
    "system": {0: PermissionError(13, "Permission denied", "/some/file")},
    "full": {
        0: ValueError("follows from it"),
        1: OSError(errno.ENOSPC, "No space left on device", "/some/file"),
    },
    "bug": {1: KeyError("forgotten")},
    "torch": {1: CheckpointException("write", {0: (OSError(errno.EDQUOT, "Disk quota exceeded"), None)})},  # type: ignore[dict-item]
}


def _fail(kind: str) -> None:
    if error := FAILURES[kind].get(dist.get_rank()):
        raise error


def _outcomes(kind: str) -> tuple[str, str]:
    with agreement(1) as ranks:
        assert ranks.gather("numbers", dist.get_rank) == [0, 1]
        assert ranks.everywhere("own number", dist.get_rank) == dist.get_rank()
        assert ranks.on_first("number of the first", dist.get_rank) == 0
        try:
            ranks.everywhere("some step", lambda: _fail(kind))
        except Exception as error:
            assert ranks.gather("later step", lambda: 1) == [1, 1], "an error leaves the ranks together"
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("kind", "error_type", "parts"),
    [
        ("user", "MismatchError", ["field x: 1 given", "(on rank 1)"]),
        ("system", "CheckpointError", ["some step", "PermissionError", "/some/file", "(on rank 0)"]),
        ("full", "DiskFullError", ["No space left on device: '/some/file'", "(on ranks 0, 1)"]),
        (
            "bug",
            "RuntimeError",
            ["some step", "(on rank 1)", "Traceback", "KeyError: 'forgotten'", "in _fail"],
        ),
        ("torch", "DiskFullError", ["Disk quota exceeded"]),
    ],
)
def test_all_ranks_raise_the_same_error(kind: str, error_type: str, parts: list[str]) -> None:
    first, second = run_on_ranks(2, _outcomes, kind)
    assert first == second
    assert first[0] == error_type
    for part in parts:
        assert part in first[1]


def _fail_on_first() -> list[str]:
    calls = []

    def action() -> None:
        calls.append(dist.get_rank())
        raise MismatchError("only the first looks")

    with agreement(1) as ranks:
        try:
            ranks.on_first("look", action)
        except MismatchError as error:
            return [str(error), *map(str, calls)]
    return []


def test_an_error_of_the_first_rank_reaches_the_others() -> None:
    assert run_on_ranks(2, _fail_on_first) == [["only the first looks", "0"], ["only the first looks"]]


def _miss(rank: int, when: str) -> tuple[str, str, float]:
    started = time.monotonic()
    try:
        if dist.get_rank() == rank and when == "start":
            time.sleep(2)
            return "", "", 0
        with agreement(0.5 / 60) as ranks:
            ranks.everywhere("first step", lambda: None)
            if dist.get_rank() == rank:
                time.sleep(2)
                return "", "", 0
            _wait(ranks)
    except MissingRanksError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", 0


def _wait(ranks: Agreement) -> None:
    ranks.everywhere("second step", lambda: None)


@pytest.mark.parametrize("when", ["start", "step"])
def test_a_missing_rank_is_named_after_the_time_out(when: str) -> None:
    results: list[Any] = run_on_ranks(2, _miss, 1, when)
    name, message, seconds = results[0]
    assert name == "MissingRanksError"
    assert "rank 1 did not come" in message if when == "start" else "Ranks 1 failed" in message
    assert when == "start" or "'second step'" in message
    assert seconds < 2


def _hide_full_disk() -> None:
    """What torch.save does."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


def test_full_disk_is_found_behind_what_it_caused() -> None:
    with pytest.raises(RuntimeError) as caught:
        _hide_full_disk()
    full = disk_full_in(caught.value)
    assert full is not None
    assert full.errno == errno.ENOSPC
    assert disk_full_in(OSError(errno.EIO, "broken")) is None
    assert disk_full_in(None) is None


def test_errors_are_shown_without_a_traceback() -> None:
    assert issubclass(CheckpointError, ConfigError)
    assert issubclass(DiskFullError, CheckpointError)
