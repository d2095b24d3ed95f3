"""Checkpoints keep what was measured on their weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.megatron_ext.training.runs import logged_to, reports, tiny_run, train
from tests.ranks import run_on_ranks

DMC = {
    "layer_types": "0_1_2_3",
    "policy": {"name": "dmc", "stage": "retrofit", "target_compression_ratio": 2},
}


def noted(save: Path, iteration: int) -> dict[str, Any]:
    return json.loads((save / f"iter_{iteration:07}" / "progress.json").read_text())["measured"]


def test_the_newest_numbers_are_kept(tmp_path: Path) -> None:
    """Those of training are of its own iteration; those of validation are older, also of the run before."""
    saving = {"save": str(tmp_path / "save"), "save_interval": 2}
    sections = {"compression": DMC, "checkpoint": saving}
    run = tiny_run(train={"train_iters": 4, "eval_interval": 2, "eval_iters": 1}, **sections)
    run_on_ranks(1, train, logged_to(run, tmp_path / "metrics.jsonl"))
    lines = reports(tmp_path / "metrics.jsonl")
    steps = {line["iteration"]: line for line in lines if "lm_loss" in line}
    evaluations = {line["iteration"]: line for line in lines if "validation_loss" in line}
    assert noted(tmp_path / "save", 2) == {
        "training": {
            "iteration": 2,
            "loss": steps[2]["lm_loss"],
            "compression_ratio": steps[2]["compression_ratio"],
        }
    }
    after = noted(tmp_path / "save", 4)
    assert after["training"]["iteration"] == 4
    assert after["validation"] == {
        "iteration": 2,
        "loss": pytest.approx(evaluations[2]["validation_loss"]),
        "compression_ratio": evaluations[2]["validation_compression_ratio"],
    }
    longer = tiny_run(train={"train_iters": 5}, **sections)
    run_on_ranks(1, train, longer)
    assert noted(tmp_path / "save", 5)["validation"] == after["validation"]


def test_a_policy_that_reports_nothing(tmp_path: Path) -> None:
    run = tiny_run(train={"train_iters": 3}, checkpoint={"save": str(tmp_path)})
    run_on_ranks(1, train, run)
    assert noted(tmp_path, 3).keys() == {"training"}
    assert noted(tmp_path, 3)["training"].keys() == {"iteration", "loss"}
