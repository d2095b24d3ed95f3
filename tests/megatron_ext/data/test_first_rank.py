import logging
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ext.data import first_rank
from megatron_ext.data.first_rank import on_first_rank
from megatron_ext.errors import ConfigError
from tests.ranks import run_on_ranks


def work_of(duty: str) -> Any:
    if duty == "setting":
        raise ConfigError("no such file")
    if duty == "bug":
        raise KeyError("x")
    if duty == "slow":
        time.sleep(3)
    return {"rank": dist.get_rank(), "duty": duty}


def do(duties: list[str], timeout_minutes: float) -> list[Any]:
    """Results of each duty, with the exceptions as (type, message), and what was logged."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    first_rank.logger.addHandler(handler)
    first_rank.logger.setLevel(logging.INFO)
    first_rank._LOG_EVERY_SECONDS = 0.5
    results: list[Any] = []
    for duty in duties:
        try:
            results.append(
                on_first_rank(
                    lambda duty=duty: work_of(duty),
                    what="index",
                    timeout_minutes=timeout_minutes,
                    timeout_setting="data.index_timeout_minutes",
                )
            )
        except Exception as error:
            results.append((type(error).__name__, str(error)))
    first_rank.logger.removeHandler(handler)
    dist.barrier()
    return [*results, records]


def test_without_other_ranks_the_work_is_just_done() -> None:
    assert on_first_rank(lambda: 5, what="index", timeout_minutes=0, timeout_setting="x") == 5


def test_rank_0_works_and_all_get_the_result() -> None:
    for results in run_on_ranks(2, do, ["a", "b", "a"], 1.0):
        assert results[:3] == [{"rank": 0, "duty": duty} for duty in ("a", "b", "a")]


def test_failures_reach_all_ranks_at_once() -> None:
    begin = time.monotonic()
    rank_0, rank_1 = run_on_ranks(2, do, ["setting", "bug", "fine"], 10.0)
    assert time.monotonic() - begin < 60
    assert rank_0[:2] == [("ConfigError", "no such file"), ("KeyError", "'x'")]
    assert rank_1[:2] == [
        ("ConfigError", "no such file"),
        ("RuntimeError", "rank 0 could not make the index: KeyError: 'x'"),
    ]
    assert rank_0[2] == rank_1[2] == {"rank": 0, "duty": "fine"}


def test_waiting_is_logged_and_ends_with_a_named_timeout() -> None:
    _, rank_1 = run_on_ranks(2, do, ["slow"], 1.5 / 60)
    name, message = rank_1[0]
    assert name == "TimeoutError"
    assert "rank 1 has waited" in message
    assert "for the index, which rank 0 on " in message
    assert message.endswith("raise data.index_timeout_minutes (0.025).")
    assert rank_1[1][0].startswith("WARNING waiting for the index, which rank 0 on ")
    assert len(rank_1[1]) == 2


STORE_PROCESS = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def test_the_death_of_rank_0_with_the_store_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STORE_PROCESS], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(process.stdout.readline()), is_master=False)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(first_rank, "_get_default_store", lambda: store)
        threading.Timer(1, process.kill).start()
        with pytest.raises(RuntimeError, match="rank 1 lost rank 0, which was to make the index"):
            on_first_rank(lambda: None, what="index", timeout_minutes=1, timeout_setting="x")
