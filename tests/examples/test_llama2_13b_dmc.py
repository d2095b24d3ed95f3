"""The three stages of the recipe fit together, and its launcher starts or resumes one of them."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_ext.command_line import config_to_dict, parse_run_config
from megatron_ext.validation.run import problems
from tests.examples.costs import gpu_hours

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "llama2_13b_dmc"
STAGES = ("zero_out", "retrofit", "finetune")


@pytest.fixture(scope="module")
def runs():
    return {stage: parse_run_config(["--config", str(RECIPE / f"{stage}.yaml")]) for stage in STAGES}


def test_every_configuration_is_of_its_stage_and_can_work(runs):
    for stage, run in runs.items():
        assert (run.compression.policy.name, run.compression.policy.stage) == ("dmc", stage)
        assert [problems(run, processes) for processes in (8, 64)] == [[], []]


def test_the_schedule_is_the_published_one(runs):
    assert [run.train.train_iters for run in runs.values()] == [250, 6000, 2000]
    assert {(run.train.global_batch_size, run.train.seq_length) for run in runs.values()} == {(1024, 4096)}
    assert {run.optimizer.lr for run in runs.values()} == {3e-5}
    assert [run.optimizer.lr_decay_style for run in runs.values()] == ["constant", "constant", "cosine"]
    assert runs["finetune"].optimizer.min_lr == 3e-6
    ratios = {runs[stage].compression.policy.target_compression_ratio for stage in ("retrofit", "finetune")}
    assert ratios == {4.0}


def test_every_stage_takes_the_weights_that_the_one_before_saves(runs):
    assert all(run.checkpoint.finetune for run in runs.values())
    assert runs["retrofit"].checkpoint.load == runs["zero_out"].checkpoint.save
    assert runs["finetune"].checkpoint.load == runs["retrofit"].checkpoint.save


def test_the_stages_differ_in_nothing_else(runs):
    first, *others = (config_to_dict(run) for run in runs.values())
    for sections in (first, *others):
        del (
            sections["compression"]["policy"],
            sections["optimizer"],
            sections["checkpoint"],
            sections["logging"],
        )
        for name in ("train_iters", "seed", "eval_interval"):
            del sections["train"][name]
    assert all(sections == first for sections in others)


def test_the_page_says_what_the_stages_cost(runs):
    page = (RECIPE / "README.md").read_text(encoding="utf-8")
    hours = {stage: gpu_hours(run, vocab_size=32000) for stage, run in runs.items()}
    for stage, number in hours.items():
        assert re.search(rf"^\| `{stage}` \|.*\| {number:,.0f} \|", page, re.MULTILINE)
    assert f"| Cost | {sum(hours.values()):,.0f} GPU-hours" in page
    assert f"about {sum(hours.values()) / 64:.0f} hours on the 64 GPUs" in page


def launch(folder, *arguments, **variables):
    """What launch.sh hands to the common launcher, of which `folder` has a stand-in."""
    stand_in = folder / "examples" / "launch_on_slurm.sh"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text('echo "$CONFIG" "$CHECKPOINTS" "$MINUTES" "$@"\n', encoding="utf-8")
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(folder), **variables}
    command = ["bash", str(RECIPE / "launch.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_stage_is_launched(tmp_path):
    said = launch(tmp_path, "retrofit", "--train.seed", "1").stdout
    assert said == (
        "examples/llama2_13b_dmc/retrofit.yaml runs/llama2_13b_dmc/retrofit/checkpoints 1410 "
        "examples/llama2_13b_dmc "
        "--train.seed 1\n"
    )


@pytest.mark.parametrize("arguments", [(), ("fade",), ("--train.seed", "1")])
def test_a_stage_must_be_named(arguments, tmp_path):
    result = launch(tmp_path, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("usage: launch.sh zero_out|retrofit|finetune")
