"""The benchmark of prompts that stop early, at a tiny size, and what its rows say."""

import csv
from pathlib import Path

import pytest
import torch

from tools.benchmarks.early_exit import main

RESULTS = Path(__file__).resolve().parents[3] / "tools" / "benchmarks" / "results" / "early_exit.csv"


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "early_exit.csv"
    sizes = "--layers 4 --heads 2 --kv-heads 1 --head-dim 16 --vocab-size 50 --length 48 --sliding-window 8"
    threads = ["--threads", str(torch.get_num_threads())]
    main([*sizes.split(), *threads, "--repeats", "1", "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [(row["map"], row["way"], row["passes"]) for row in rows] == [
        (name, way, "3" if name == "lckv" else "1")
        for name in ("plain", "cla", "yoco", "lckv")
        for way in ("early exit", "all layers")
    ]
    assert (rows[0]["ratio"], rows[0]["gflop_ratio"]) == ("1.0", "1.0")
    assert all(
        float(one["gflop"]) <= float(other["gflop"]) for one, other in zip(rows[::2], rows[1::2], strict=True)
    )
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_what_was_measured() -> None:
    rows = {(row["map"], row["way"]): row for row in csv.DictReader(RESULTS.open())}
    assert {row["length"] for row in rows.values()} == {"2048"}
    assert float(rows["yoco", "early exit"]["ratio"]) <= 0.55
    for name in ("plain", "cla", "yoco", "lckv"):
        exits, whole = (rows[name, way] for way in ("early exit", "all layers"))
        assert float(exits["gflop"]) < float(whole["gflop"])
        assert float(exits["ratio"]) <= float(exits["gflop_ratio"]) + 0.11
