"""The benchmark of continued prompts, at a tiny size, and what its rows say."""

import csv
from pathlib import Path

from tools.benchmarks.continued_prompts import main

RESULTS = Path(__file__).resolve().parents[3] / "tools" / "benchmarks" / "results" / "continued_prompts.csv"


def test_a_tiny_run(tmp_path: Path) -> None:
    output = tmp_path / "continued_prompts.csv"
    sizes = "--past 16 48 --new 8 --layers 2 --hidden-size 64 --repeats 1"
    main([*sizes.split(), "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [(row["past_tokens"], row["model"]) for row in rows] == [
        (length, name)
        for length in ("16", "48")
        for name in ("transformers", "this project", "this project's engine")
    ]


def test_what_was_measured() -> None:
    rows = list(csv.DictReader(RESULTS.open()))
    assert {int(row["past_tokens"]) for row in rows} >= {8192}
    assert all(float(row["ratio_to_transformers"]) <= 1.1 for row in rows)
