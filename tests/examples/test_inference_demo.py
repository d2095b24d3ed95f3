"""The demo of inference: its five models differ in their cache only, and every command of its script is one
that the programs know."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from checkpoints_conversion.options import build_parser
from lckv_megatron.commands import generate, perplexity
from megatron_ext.command_line import config_to_dict, parse_run_config
from megatron_ext.validation.run import problems
from tools.benchmarks import inference

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "inference_demo"
MODELS = ("plain", "lckv", "yoco", "dmc", "lckv_dmc")
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@"; echo
while [ $# -gt 0 ]; do [ "$1" != --hf-path ] || mkdir -p "$2"; shift; done
"""
"""Of Python: says its arguments, and makes the folder that a conversion would make."""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """What the script would run."""
    folder = tmp_path_factory.mktemp("demo")
    data = folder / "data"
    data.mkdir()
    for name in ("corpus.jsonl", "tokenizer.model", "dataset.idx"):
        (data / name).touch()
    python = folder / "python"
    python.write_text(STAND_IN, encoding="utf-8")
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "DATA": str(data)}
    result = subprocess.run(
        ["bash", str(DEMO / "run.sh"), str(folder / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines() if line.startswith(("-m ", "tools/"))]


def options(commands, program):
    """Arguments of each call of a program."""
    return [command[command.index(program) + 1 :] for command in commands if program in command]


def test_the_models_are_trained_alike(commands):
    runs = [parse_run_config(arguments) for arguments in options(commands, "pretrain_lckv.py")]
    assert [Path(run.checkpoint.save).parent.name for run in runs] == list(MODELS)
    assert [problems(run, 2) for run in runs] == [[]] * len(MODELS)
    found = [config_to_dict(run) for run in runs]
    for sections in found:
        del sections["compression"], sections["checkpoint"], sections["logging"]
    assert all(sections == found[0] for sections in found)


def test_they_differ_in_map_and_policy(commands):
    compressions = [
        parse_run_config(arguments).compression for arguments in options(commands, "pretrain_lckv.py")
    ]
    kinds = [(each.policy.name, each.map(8).any_cyclic, each.map(8).any_sliding) for each in compressions]
    assert kinds == [
        ("dense", False, False), ("dense", True, False), ("dense", False, True),
        ("dmc", False, False), ("dmc", True, False),
    ]  # fmt: skip
    assert compressions[1].layer_types == compressions[4].layer_types
    assert compressions[3].policy == compressions[4].policy


def test_what_is_trained_is_converted_and_measured(commands):
    converted = [
        build_parser("convert").parse_args(arguments)
        for arguments in options(commands, "checkpoints_conversion")
    ]
    trained = [
        parse_run_config(arguments).checkpoint.save for arguments in options(commands, "pretrain_lckv.py")
    ]
    assert [str(each.megatron_path) for each in converted] == trained
    folders = [str(each.hf_path) for each in converted]
    (measured,) = (
        inference._parser().parse_args(each) for each in options(commands, "tools.benchmarks.inference")
    )
    assert [text.partition("=")[2] for text in measured.models] == folders
    longest = parse_run_config(options(commands, "pretrain_lckv.py")[0]).train.seq_length
    assert max(measured.context, *(length + 1 for length in measured.lengths)) <= longest
    for program, parser in (
        ("perplexity", perplexity._parser()),
        ("generate", generate._parser()),
    ):
        assert [str(parser.parse_args(each).model) for each in options(commands, program)] == folders


def test_its_page_names_what_it_makes():
    page = (DEMO / "README.md").read_text(encoding="utf-8")
    run = parse_run_config(["--config", str(DEMO / "base.yaml"), "--config", str(DEMO / "dmc.yaml")])
    assert (
        f"{run.train.train_iters} steps of {run.train.global_batch_size * run.train.seq_length:,} tokens"
        in page
    )
    for model in MODELS:
        compression = parse_run_config(
            ["--config", str(DEMO / f"{model}.yaml"), "--config", str(DEMO / "base.yaml")]
        ).compression
        assert re.search(rf"^\| {model} \|.*`{compression.layer_types}`", page, re.MULTILINE)
