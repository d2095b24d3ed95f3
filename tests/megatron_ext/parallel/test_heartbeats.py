"""A rank that keeps the others waiting is named: one that sleeps, is stopped, or never began."""

import time

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config import RunConfig
from megatron_ext.errors import LostRankError
from megatron_ext.parallel.heartbeats import heartbeats
from megatron_ext.training import iteration
from tests.megatron_ext.training.runs import messages, tiny_run
from tests.ranks import run_on_ranks

SHORT = {"distributed_timeout_minutes": 0.04}
"""Rank 0 warns after about two seconds."""


@pytest.mark.parametrize("stages", [1, 2])
def test_a_rank_that_sleeps_is_named_while_the_others_wait(stages: int) -> None:
    parallel = {**SHORT, "pipeline_model_parallel_size": stages}
    cyclic = {"layer_types": "0_2_2_3"}
    run = tiny_run(train={"train_iters": 3}, parallel=parallel, compression=cyclic if stages > 1 else {})
    first, second = run_on_ranks(2, messages_of_a_sleeper, run)
    warnings = [line for line in first if "has not arrived" in line]
    assert len(warnings) == 1, first
    assert warnings[0].startswith(
        "rank 0 waits at iteration 2 for 2 s: rank 1 has not arrived: it is at iteration 2"
    )
    assert "in sleepy (test_heartbeats.py:" in warnings[0]
    assert warnings[0].partition("), called by ")[2].startswith("_train (iteration.py:")
    assert not [line for line in second if "has not arrived" in line]


def messages_of_a_sleeper(run: RunConfig) -> list[str]:
    """Rank 1 sleeps before the second step."""
    steps = []
    train_step = iteration.train_step

    def sleepy(*arguments, **options):
        steps.append(1)
        if dist.get_rank() == 1 and len(steps) == 2:
            time.sleep(3.5)
        return train_step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "train_step", sleepy)
        return messages(run)


def test_a_collective_that_fails_says_who_is_missing() -> None:
    first, second = run_on_ranks(2, lost)
    assert first.startswith("rank 0 waits at iteration 7 for ")
    assert "rank 1 has not arrived: it is at iteration 7 for " in first
    assert "in _sleep_long (test_heartbeats.py:" in first
    assert first.count("rank 0") == 1
    assert first.endswith(" (Timed out waiting 1000ms for recv operation to complete)")
    assert second == "slept"


def lost() -> str:
    group = dist.new_group(backend="gloo", timeout=torch.distributed.timedelta(seconds=1))
    if dist.get_rank() == 1:
        with heartbeats(0.02) as beat:
            beat(7)
            _sleep_long()
        return "slept"

    def wait() -> None:
        with heartbeats(0.02) as beat:
            beat(7)
            dist.all_reduce(torch.ones(1), group=group)

    with pytest.raises(LostRankError) as lost:
        wait()
    return str(lost.value)


def _sleep_long() -> None:
    time.sleep(4)


def test_a_silent_rank_and_one_that_never_began() -> None:
    said = run_on_ranks(2, silent)[0]
    assert "rank 1 has given no sign of life for " in said[0]
    assert "it was at iteration 3, in " in said[0]
    assert "rank 1 has never begun" in said[1]


def silent() -> list[str]:
    from megatron_ext.parallel.heartbeats import Heartbeats

    store = dist.distributed_c10d._get_default_store()
    said = []
    for name in ("silent", "absent"):
        beats = Heartbeats(dist.PrefixStore(name, store), 0.001)
        beats.at(3)
        if dist.get_rank() == 0 or name == "silent":
            beats._store.set(f"heartbeats/{dist.get_rank()}", _as_json(beats))
        dist.barrier()
        time.sleep(4 * beats.pause)
        if dist.get_rank() == 0:
            beats._store.set("heartbeats/0", _as_json(beats))
        said.append(beats.describe())
    return said


def _as_json(beats) -> str:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(beats._sign()))


def test_other_errors_pass() -> None:
    assert run_on_ranks(2, other_errors) == ["a bug"] * 2


def other_errors() -> str:
    def fail() -> None:
        with heartbeats(1.0):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError) as raised:
        fail()
    return str(raised.value)


def test_a_run_of_one_process_has_no_heartbeats() -> None:
    assert run_on_ranks(1, threads) == [False]


def threads() -> bool:
    import threading

    with heartbeats(1.0) as beat:
        beat(1)
        return any(thread.name == "heartbeats" for thread in threading.enumerate())
