"""Errors that users can mend are one message; others keep their traceback."""

import logging

import pytest

from lckv.errors import ModelError
from megatron_ext import console
from megatron_ext.console import exit_status
from megatron_ext.errors import ConfigError, LostRankError
from tests.ranks import run_on_ranks


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("set x to 1"), 2),
        (ModelError("mlp_bias is True"), 2),
        (ArithmeticError("the loss is nan"), 1),
    ],
)
def test_messages(error: Exception, status: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert exit_status(lambda: raising(error)) == status
    assert caplog.messages == [f"error: {error}"]


def test_success_and_bugs() -> None:
    assert exit_status(lambda: None) == 0
    with pytest.raises(KeyError):
        exit_status(lambda: raising(KeyError("a bug")))


def test_ctrl_c_of_a_library_is_a_signal_too(caplog: pytest.LogCaptureFixture) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert exit_status(interrupt, on_stop="; nothing was written") == 130
    assert caplog.messages == ["stopped by SIGINT; nothing was written"]


def test_what_all_ranks_raise_is_said_once_and_what_follows_from_it_not_at_all() -> None:
    """Rank 1 of three fails by itself; the others lose it. Another time all fail alike."""
    alone, alike, lost = zip(*run_on_ranks(3, failures), strict=True)
    assert alone == ((1, []), (2, ["error: only here"]), (1, []))
    assert [status for status, _ in alike] == [2, 2, 2]
    assert [line for _, said in alike for line in said] == ["error: everywhere"]
    assert [status for status, _ in lost] == [1, 0, 1]
    # The first of both speaks; the other one does too if it comes before the first one is known.
    assert {"error: rank 1 is missing, says 0", "error: rank 1 is missing, says 2"}.issuperset(
        said := [line for _, lines in lost for line in lines]
    )
    assert said


def failures() -> list[tuple[int, list[str]]]:
    import torch.distributed as dist

    rank = dist.get_rank()
    cases = [
        ConfigError("only here") if rank == 1 else LostRankError("rank 1 is missing"),
        ConfigError("everywhere"),
        None if rank == 1 else LostRankError(f"rank 1 is missing, says {rank}"),
    ]
    store = dist.distributed_c10d._get_default_store()
    outcomes = []
    for error in cases:
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(console, "_say", lambda level, line, said=said: said.append(line))
            patch.setattr(console, "let_first_rank_speak", lambda: None)
            if rank != 1:
                dist.barrier()  # the others notice later
                status = exit_status(lambda error=error: raising(error) if error else None)
            else:
                status = exit_status(lambda error=error: raising(error) if error else None)
                dist.barrier()
        outcomes.append((status, said))
        dist.barrier()
        if rank == 0:
            store.delete_key(console._FAILURES)
        dist.barrier()
    return outcomes
