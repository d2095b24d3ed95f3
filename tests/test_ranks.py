"""The harness of the distributed tests: results, failures, deaths, hangs, and what one case leaves to the
next."""

import os
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import RankError, RankTimeoutError, kill_pools, run_on_ranks


def _sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def _process_id() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def _environment() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "rank": int(os.environ["RANK"]),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "cuda": torch.cuda.is_available(),
        "model_parallel": parallel_state.model_parallel_is_initialized(),
        "number": torch.rand(()).item(),
    }


def _leave_model_parallel_behind() -> bool:
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    assert not parallel_state.model_parallel_is_initialized()
    assert not get_cuda_rng_tracker().is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    get_cuda_rng_tracker().add("left-behind", 1)
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 2, 1, 1)
    return parallel_state.model_parallel_is_initialized()


def _make_world_again() -> int:
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    ones = torch.ones(())
    dist.all_reduce(ones)
    return int(ones)


def _open_sockets() -> int:
    parallel_groups = [dist.new_group([0, 1]) for _ in range(3)]
    for group in parallel_groups:
        dist.barrier(group)
    return len(os.listdir("/proc/self/fd"))


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"wrong on rank {rank}")
    dist.barrier()


def _raise_everywhere() -> None:
    raise KeyError("everywhere")


class _AwkwardError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def _raise_unpicklable() -> None:
    raise _AwkwardError("left", "right")


def _return_unpicklable() -> Any:
    return lambda: None


def _exit(code: int) -> None:
    if dist.get_rank() == 0:
        os._exit(code)
    dist.barrier()


def _system_exit() -> None:
    sys.exit(3)


def _wait_in_vain() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        time.sleep(600)


def _start_a_child() -> int:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return child


def _is_running(process_id: int) -> bool:
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_results_come_in_rank_order_and_tensors_travel() -> None:
    for total in run_on_ranks(2, _sum_over_ranks, torch.tensor([1.0, 2.0])):
        assert torch.equal(total, torch.tensor([3.0, 6.0]))
    assert [rank for rank, _ in run_on_ranks(2, _process_id)] == [0, 1]


def test_processes_are_used_again_and_are_not_the_parent() -> None:
    assert run_on_ranks(2, _process_id) == run_on_ranks(2, _process_id)
    assert run_on_ranks(1, _process_id)[0][1] != os.getpid()


def test_environment_is_that_of_torchrun_and_equal_in_every_case() -> None:
    first, second = run_on_ranks(2, _environment), run_on_ranks(2, _environment)
    assert first == second
    assert [case["rank"] for case in first] == [case["local_rank"] for case in first] == [0, 1]
    expected = {"world_size": 2, "threads": 1, "backend": "gloo", "cuda": False, "model_parallel": False}
    assert all(case.items() >= expected.items() for case in first)


def test_what_a_case_leaves_is_destroyed() -> None:
    assert run_on_ranks(2, _leave_model_parallel_behind) == [True, True]
    assert run_on_ranks(2, _leave_model_parallel_behind) == [True, True]


def test_a_case_may_make_the_world_group_from_the_variables_of_torchrun() -> None:
    # A pool can do this once: torch writes the addresses of both groups under the same keys of one store.
    kill_pools()
    assert run_on_ranks(2, _make_world_again) == [2, 2]
    kill_pools()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_groups_do_not_add_up() -> None:
    before = run_on_ranks(2, _open_sockets)
    for _ in range(5):
        after = run_on_ranks(2, _open_sockets)
    assert max(after) <= max(before) + 4, "file descriptors grow from case to case"


def test_exception_of_one_rank_is_raised_while_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    with pytest.raises(ValueError, match="wrong on rank 1") as caught:
        run_on_ranks(2, _raise_on, 1)
    notes = "\n".join(caught.value.__notes__)
    assert "Traceback of rank 1 of 2" in notes
    assert "in _raise_on" in notes
    assert "Ranks [0] were still waiting" in notes
    assert run_on_ranks(2, _process_id)[1][0] == 1, "the next case gets a new pool"


def test_exception_on_every_rank_keeps_the_pool() -> None:
    before = run_on_ranks(2, _process_id)
    with pytest.raises(KeyError, match="everywhere"):
        run_on_ranks(2, _raise_everywhere)
    assert run_on_ranks(2, _process_id) == before


def test_exception_that_cannot_be_pickled_is_described() -> None:
    with pytest.raises(RankError, match="_AwkwardError: left right"):
        run_on_ranks(1, _raise_unpicklable)


def test_result_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(RankError, match="result of type function cannot be pickled"):
        run_on_ranks(1, _return_unpicklable)


def test_function_that_cannot_be_pickled_is_refused() -> None:
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        run_on_ranks(1, lambda: None)


def test_exit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        run_on_ranks(1, _system_exit)
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    with pytest.raises((RankError, RuntimeError)):
        run_on_ranks(2, _exit, 7)
    assert len(run_on_ranks(2, _process_id)) == 2


def test_hang_fails_with_the_place_where_each_rank_was() -> None:
    started = time.monotonic()
    with pytest.raises(RankTimeoutError, match=r"ranks \[0, 1\] of 2 did not answer within 1 s") as caught:
        run_on_ranks(2, _wait_in_vain, timeout=1)
    assert time.monotonic() - started < 60
    assert str(caught.value).count("in _wait_in_vain") == 2
    assert len(run_on_ranks(2, _process_id)) == 2, "the next case gets a new pool"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_killing_a_pool_ends_the_children_of_its_processes() -> None:
    child = run_on_ranks(1, _start_a_child)[0]
    process = run_on_ranks(1, _process_id)[0][1]
    assert _is_running(child)
    ranks.kill_pools()
    for _ in range(100):
        if not _is_running(child):
            break
        time.sleep(0.05)
    assert not _is_running(child)
    assert not _is_running(process)


def test_idle_pools_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MAX_IDLE_PROCESSES", 2)
    oldest = run_on_ranks(1, _process_id)[0][1]
    run_on_ranks(2, _process_id)
    assert not _is_running(oldest)
