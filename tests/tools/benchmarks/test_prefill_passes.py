"""The benchmark of passes over prompts, at a tiny size."""

import csv
from pathlib import Path

import pytest

from lckv.generation.config import EngineConfig
from tools.benchmarks.prefill_passes import TOLERANCES, main

RESULTS = Path(__file__).resolve().parents[3] / "tools" / "benchmarks" / "results" / "prefill_passes.csv"


def test_more_passes_come_nearer_to_decoding(tmp_path: Path) -> None:
    output = tmp_path / "passes.csv"
    main(
        [
            "--maps",
            "sandwich-middle",
            "--steps",
            "2",
            "--hidden-size",
            "16",
            "--rows",
            "2",
            "--row-length",
            "8",
            "--output",
            str(output),
        ]
    )
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [row["way"] for row in rows] == ["token by token"] + ["passes"] * 9 + ["tolerance"] * len(
        TOLERANCES
    )
    changes = [abs(float(row["perplexity_change_percent"])) for row in rows if row["way"] == "passes"]
    assert changes[-1] == pytest.approx(0, abs=1e-3)  # as many passes as tokens
    assert changes[0] > 10 * changes[-1]


def test_the_default_tolerance_changes_perplexity_by_less_than_a_thousandth() -> None:
    rows = [
        row
        for row in csv.DictReader(RESULTS.read_text().splitlines())
        if row["setting"] == str(EngineConfig.prefill_tolerance)
    ]
    assert {row["map"] for row in rows} == {"lckv", "sandwich-middle"}
    for row in rows:
        assert abs(float(row["perplexity_change_percent"])) < 0.1
