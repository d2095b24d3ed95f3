"""What a run does beside training: garbage, profiles, own times of ranks, signs of life, time-outs."""

import gc
import gzip
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config import ParallelConfig, ProfileConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.process_groups import end_start, initialize
from megatron_ext.training import profile, signs_of_life
from megatron_ext.training.garbage import manual_collection
from megatron_ext.training.metrics import check_places
from megatron_ext.training.stragglers import describe
from tests.megatron_ext.training.runs import messages, tiny_run, train
from tests.ranks import run_on_ranks

LCKV = {"layer_types": "0_2_2_3", "forward_passes": 1, "backward_passes": 2}


def test_garbage_is_collected_when_it_is_due() -> None:
    (seen,) = run_on_ranks(1, _collected)
    assert seen == [False, True, False, True]


def _collected() -> list[bool]:
    """Whether a cycle is gone after each of four iterations, and that all is as it was then."""

    class Cycle:
        pass

    seen = []
    with manual_collection(2) as collect:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        for iteration in (1, 2, 3, 4):
            cycle: Any = Cycle()
            cycle.itself = cycle
            del cycle
            collect(iteration)
            seen.append(not any(isinstance(thing, Cycle) for thing in gc.get_objects()))
    assert gc.isenabled()
    return seen


def test_without_an_interval_python_decides() -> None:
    before = gc.get_freeze_count()
    with manual_collection(0) as collect:
        collect(1)
        assert gc.isenabled() and gc.get_freeze_count() == before


def test_the_chosen_iterations_of_the_chosen_rank_are_profiled(tmp_path: Path) -> None:
    options = {"start_iteration": 2, "num_iterations": 2, "ranks": ["1"], "folder": str(tmp_path / "profile")}
    run = tiny_run(compression=LCKV, train={"train_iters": 4}, profile=options)
    assert run_on_ranks(2, train, run) == [4, 4]
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["rank_00001_iterations_2_to_3.trace.json.gz", "rank_00001_iterations_2_to_3.txt"]
    with gzip.open(tmp_path / "profile" / names[0]) as file:
        seen = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"iteration 2", "iteration 3"} <= seen
    assert not {"iteration 1", "iteration 4"} & seen
    passes = {name for name in seen if str(name).startswith("group ")}
    assert passes == {
        "group 0 pass 0", "group 1 pass 0 without gradient", "group 1 pass 1", "group 1 pass 2",
        "group 2 pass 0",
    }  # fmt: skip
    table = (tmp_path / "profile" / names[1]).read_text()
    assert "aten::" in table and "group 1 pass 2" in table


def test_a_profile_that_the_end_cuts_off_is_written(tmp_path: Path) -> None:
    options = {"start_iteration": 3, "num_iterations": 9}
    run = tiny_run(train={"train_iters": 3}, profile=options, checkpoint={"save": str(tmp_path)})
    (said,) = run_on_ranks(1, messages, run)
    assert f"profiled iterations from 3 on; see {tmp_path / 'profile'}" in said
    assert (tmp_path / "profile" / "rank_00000_iterations_3.txt").is_file()


def test_a_folder_that_cannot_be_is_no_end_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = {"start_iteration": 1, "num_iterations": 1, "folder": str(tmp_path / "file" / "profile")}
    (said,) = run_on_ranks(1, messages, tiny_run(train={"train_iters": 3}, profile=options))
    assert [line for line in said if line.startswith(f"profile.folder {tmp_path}/file/profile cannot be")]


def test_what_needs_a_gpu_is_begun_and_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The calls of nsys' ranges and of the memory snapshot, on a machine without a GPU."""
    calls: list[Any] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    ranges = _Ranges(calls)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda: ranges)
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    config = ProfileConfig(start_iteration=1, num_iterations=1, ranks=("all",), kinds=("memory", "nsys"))
    with profile.profiling(config, str(tmp_path)) as profiler:
        for number in (1, 2):
            with profiler.iteration(number):
                calls.append(number)
    begun = [{"max_entries": 200_000}, "start", "enter", 1]
    ended = ["exit", "stop", "rank_00003_iterations_1_to_1.memory.pickle", {"enabled": None}, 2]
    assert calls == begun + ended


class _Ranges:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        self.calls.append("enter")

    def __exit__(self, *error: object) -> None:
        self.calls.append("exit")


def test_a_slow_rank_is_named() -> None:
    run = tiny_run(train={"train_iters": 4}, profile={"straggler_interval": 2})
    first, second = run_on_ranks(2, _messages_with_a_slow_rank, run)
    lines = [line for line in first if line.startswith("own time of the ranks, mean of 2 iterations: median")]
    assert len(lines) == 2
    assert all("stragglers: rank 1 on " in line for line in lines)
    assert not any("own time" in line for line in second)


def _messages_with_a_slow_rank(run: RunConfig) -> list[str]:
    """Rank 1 takes long to make a batch: its own work, not that of the exchange."""
    from megatron_ext.training import loop

    make_batch = loop.make_batch

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.4 if dist.get_rank() == 1 else 0.0)
        return make_batch(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_batch", slow)
        return messages(run)


def test_the_line_of_own_times() -> None:
    hosts = [f"node{rank // 8}" for rank in range(24)]
    even = describe(5, [1.0] * 24, hosts)
    assert even == "own time of the ranks, mean of 5 iterations: median 1 s, longest 1 s"
    slow = describe(5, [1.0] * 13 + [1.05] + [1.2 + rank / 100 for rank in range(10)], hosts)
    assert "stragglers: rank 23 on node2 1.29 s, rank 22 on node2 1.28 s," in slow
    assert slow.endswith(" and 2 more")
    assert "rank 13" not in slow


def test_the_heartbeat_file_says_where_the_run_is(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "heartbeat.json"
    before = time.time()
    run = tiny_run(train={"train_iters": 3}, logging={"heartbeat_file": str(path)})
    assert run_on_ranks(2, train, run) == [3, 3]
    sign = json.loads(path.read_text())
    assert sign["iteration"] == 3
    assert before < sign["time"] < time.time()
    assert [entry.name for entry in path.parent.iterdir()] == ["heartbeat.json"]


def test_a_heartbeat_file_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "heartbeat.json", tmp_path):
        run = tiny_run(logging={"heartbeat_file": str(path)})
        with pytest.raises(ConfigError, match=f"logging.heartbeat_file {path} cannot be written: .*choose"):
            check_places(run.logging)


def test_a_file_server_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gone").touch()
    with signs_of_life.heartbeat_file(tmp_path / "gone" / "heartbeat.json") as beat:
        beat(1)
    assert "logging.heartbeat_file" in caplog.text and "cannot be written" in caplog.text


def _monitored(run: RunConfig, error: Exception | None) -> tuple[list[str], str]:
    """What the client of nvidia-resiliency-ext is told, by its documented methods."""
    calls: list[str] = []

    class RankMonitorClient:
        def init_workload_monitoring(self) -> None:
            calls.append("init")
            if error is not None:
                raise error

        def send_heartbeat(self) -> None:
            calls.append("beat")

        def shutdown_workload_monitoring(self) -> None:
            calls.append("shutdown")

    name = "nvidia_resiliency_ext.fault_tolerance.rank_monitor_client"
    module: Any = ModuleType(name)
    module.RankMonitorClient = RankMonitorClient
    parents = {"nvidia_resiliency_ext", "nvidia_resiliency_ext.fault_tolerance"}
    with pytest.MonkeyPatch.context() as patch:
        for parent in parents:
            patch.setitem(sys.modules, parent, ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        try:
            with signs_of_life.signs_of_life(run) as beat:
                beat(1)
                beat(2)
        except ConfigError as refusal:
            return calls, str(refusal)
    return calls, ""


def test_the_monitor_is_told_of_each_sign() -> None:
    run = tiny_run(parallel={"fault_tolerance": True})
    assert run_on_ranks(1, _monitored, run, None) == [(["init", "beat", "beat", "shutdown"], "")]


def test_a_monitor_that_is_not_there_is_one_error() -> None:
    run = tiny_run(parallel={"fault_tolerance": True})
    ((calls, message),) = run_on_ranks(1, _monitored, run, ConnectionRefusedError(111, "refused"))
    assert calls == ["init"]
    assert message.startswith("parallel.fault_tolerance is true and the monitor of nvidia-resiliency-ext")
    assert "refused" in message and "Start the run with ft_launcher" in message


def _wait_after_the_start() -> tuple[float, str]:
    """Rank 1 does not come to a collective after the start, which had more time."""
    parallel = ParallelConfig(distributed_timeout_minutes=0.02, start_timeout_minutes=5.0)
    initialize(parallel, seed=1)
    end_start(parallel)
    started = time.monotonic()
    try:
        if dist.get_rank() == 1:
            time.sleep(6)
        else:
            dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return time.monotonic() - started, str(error)
    return 0.0, ""


def test_after_the_start_collectives_have_the_time_of_steps() -> None:
    (seconds, message), _ = run_on_ranks(2, _wait_after_the_start)
    assert "Timed out" in message or "timed out" in message
    assert 1 < seconds < 5
