"""The benchmark of a step of decoding, at a tiny size, and what its rows say."""

import csv
from pathlib import Path
from statistics import mean

import pytest
import torch

from tools.benchmarks.decode_step import main, models

RESULTS = Path(__file__).resolve().parents[3] / "tools" / "benchmarks" / "results"
KINDS = [
    "transformers",
    "contiguous",
    *(f"{name}{kind}" for name in models() for kind in ("paged", "engine")),
]


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "decode_step.csv"
    sizes = (
        f"--hidden-sizes 32 --layers 2 --rows 2 --tokens 9 --repeats 1 --threads {torch.get_num_threads()}"
    )
    main([*sizes.split(), "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [row["step"] for row in rows] == KINDS
    assert rows[0]["ratio_to_transformers"] == "1.0"
    calls = {row["step"]: int(row["calls"]) for row in rows}
    assert calls["paged"] < calls["contiguous"]
    assert (
        calls["engine"] < calls["paged"] + 30
    )  # what choosing tokens for requests adds, however many layers
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_chosen_models(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = f"--hidden-sizes 32 --heads 2 1 --layers 2 --tokens 9 --threads {torch.get_num_threads()}"
    main([*sizes.split(), "--rows", "1", "--repeats", "1", "--models", "A=plain", "B=0_0,forgetful"])
    steps = [line.split("tokens")[1].split("  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["transformers", "A paged", "B paged"]


def test_rows_say_what_the_page_says() -> None:
    now, before = (
        {
            (row["hidden_size"], row["rows"], row["step"]): (
                int(row["calls"]),
                float(row["ratio_to_transformers"]),
            )
            for row in csv.DictReader((RESULTS / f"{name}.csv").open())
            if row["tokens"] == "128"
        }
        for name in ("decode_step", "decode_step_before")
    )
    assert before.keys() <= now.keys()  # policies have been added since
    steps = [name for name in before if name[2].endswith(("paged", "engine"))]
    assert all(now[name][0] < 0.8 * before[name][0] for name in steps)
    ratios, before_ratios = ([rows[name][1] for name in steps] for rows in (now, before))
    assert mean(ratios) < 0.8 * mean(before_ratios)
