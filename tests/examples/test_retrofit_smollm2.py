"""The example of retrofits by distillation, from its first command to its last, on a tiny model."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_ext.command_line import parse_run_config
from megatron_ext.validation.run import problems
from tests.lckv.families.tiny_models import saved_model
from tests.megatron_ext.data.builders import CHATML, save_tokenizer
from tests.pages.stand_ins import stand_ins

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "retrofit_smollm2"
STAGES = ("map", "zero_out", "retrofit", "finetune")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.nightly
def test_the_whole_way(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "model", CHATML)
    saved_model(
        model, "llama", vocab_size=258, max_position_embeddings=512, eos_token_id=256, num_hidden_layers=4
    )
    text = tmp_path / "text.txt"
    text.write_text("hello world, document 3 of the corpus: word word word\n" * 200)
    options = ["--model", str(model), "--text", str(text), "--measured", str(text), "--rows", "2"]
    options += ["--row-length", "64", "--map", "0_2_2_3", "--init", "copy", str(tmp_path / "run"), "--"]
    options += ["--train.train_iters", "6", "--train.seq_length", "64", "--optimizer.lr", "0.003"]
    with stand_ins(tmp_path / "programs", hub=tmp_path / "hub") as environment:
        result = subprocess.run(
            ["bash", str(EXAMPLE / "run.sh"), *options],
            env=environment, capture_output=True, text=True, timeout=550,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    stages = [line.split()[0] for line in lines if "distillation loss" in line]
    assert stages == ["map-distilled", "dms-zero-out", "dms-retrofit", "dms-finetune"]
    match = re.search(
        r"^map-distilled +distillation loss ([\d.]+) -> ([\d.]+) in 6 reports$", result.stdout, re.M
    )
    assert match is not None and float(match[2]) < float(match[1])
    measured = [line.split()[0] for line in lines if "perplexity" in line and "slot" in line]
    assert measured == ["original", "map-before", "map-after", "dms-after"]


@pytest.mark.parametrize("stage", STAGES)
def test_its_settings_can_work(stage: str) -> None:
    """As the script gives them, on a model with DMS's one needed query head for each KV head."""
    words = ["--config", str(EXAMPLE / "base.yaml"), "--config", str(EXAMPLE / f"{stage}.yaml")]
    words += ["--model.vocab_size", "64", "--data.mock", "true", "--model.num_attention_heads", "8"]
    run = parse_run_config([*words, "--model.num_query_groups", "4", "--checkpoint.load", os.devnull])
    assert problems(run, 1) == []
