"""The benchmark of steps of a cyclic map, at a tiny size."""

import csv
from pathlib import Path

from tests.ranks import run_on_ranks
from tools.benchmarks.cyclic_step import PASSES, main


def test_every_number_of_passes_has_a_row(tmp_path: Path) -> None:
    output = tmp_path / "steps.csv"
    sizes = ["--hidden-size", "16", "--seq-length", "8", "--repeats", "1"]
    run_on_ranks(1, main, [*sizes, "--output", str(output)])
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert len(rows) == 1 + len(PASSES)
    assert rows[0]["passes"] == "plain"
    predicted = {row["passes"]: float(row["predicted_ratio"]) for row in rows}
    assert predicted["m 0, b 1, first guess"] < predicted["m 1, b 1"] < predicted["m 7, b 2"]
    assert all(float(row["cpu_milliseconds"]) > 0 for row in rows)
