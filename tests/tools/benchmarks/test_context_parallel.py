"""The benchmark of context parallelism: its runs are valid, and what it says of them."""

import csv
from pathlib import Path

import pytest

from megatron_ext.command_line import parse_run_config
from megatron_ext.validation.run import problems
from tools.benchmarks import context_parallel, pipeline


def test_rows_compare_runs_that_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def seconds(arguments: list[str], processes: int) -> float:
        run = parse_run_config(arguments)
        assert problems(run, processes) == []
        assert run.parallel.context_parallel_size == processes
        started.append(processes)
        return 3.0 / processes

    monkeypatch.setattr(pipeline, "seconds_of_step", seconds)
    output = tmp_path / "rows.csv"
    context_parallel.main(["--seq-length", "64", "--window", "8", "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert started == [1, 2, 2, 1, 2, 1, 2], "one process serves both ways of sending"
    assert {row["ratio"] for row in rows} == {"0.5"}
    sent = {(row["map"], row["communication"]): float(row["sent_mebibytes"]) for row in rows}
    assert sent["plain", "ring"] == pytest.approx(1.5 * sent["plain", "gather"], rel=0.1)
    assert sent["YOCO", "gather"] < sent["plain", "gather"]
