"""The toy example of long contexts, from its first command to its last, in small, and its data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.command_line import parse_run_config
from megatron_ext.training.metrics import read_metrics
from megatron_ext.validation.run import problems
from tests.pages.stand_ins import stand_ins

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "long_context_toy"
LENGTH = 2048
SIZES = {
    "ROWS": f"64x64 8x256 8x512 4x{LENGTH}",
    "SHORT": "--train.train_iters 4 --optimizer.lr_warmup_iters 0",
    "MIDDLE": "--train.train_iters 1",
    "LONG": "--train.train_iters 3",
    "JUDGE": "--least 0",
}
"""So few steps teach nothing: the judge is to be content with no needle at all."""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_whole_way(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with stand_ins(tmp_path / "programs", hub=tmp_path / "hub") as environment:
        result = subprocess.run(
            ["bash", str(EXAMPLE / "run.sh"), str(folder)],
            env=environment | SIZES, capture_output=True, text=True, timeout=550,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    said = result.stdout + result.stderr
    assert "train.exit_duration_minutes are over" in said  # it was stopped behind its first iteration
    reports = read_metrics(folder / f"{LENGTH}-run" / "metrics.jsonl")
    assert [report["iteration"] for report in reports] == [1, 2, 3]
    assert [report["consumed_tokens"] for report in reports] == [LENGTH, 2 * LENGTH, 3 * LENGTH]
    assert sorted(path.name for path in (folder / f"{LENGTH}-run" / "checkpoints").glob("iter_*")) == [
        "iter_0000001",
        "iter_0000003",
    ]
    assert re.search(rf"^{LENGTH:,} +(\d of 3 *){{5}}$", result.stdout, re.MULTILINE)
    assert (folder / "needles.png").stat().st_size > 0


def test_the_rows_are_split_and_kept_on_the_host() -> None:
    """The long run is what the page says, and can work on two processes."""
    files = [word for name in ("short", "long") for word in ("--config", str(EXAMPLE / f"{name}.yaml"))]
    mock = ["--data.mock", "true", "--model.vocab_size", "256", "--checkpoint.load", "x"]
    run = parse_run_config([*files, *mock])
    assert problems(run, 2) == []
    assert (run.train.seq_length, run.parallel.context_parallel_size) == (65536, 2)
    assert run.train.activation_offload == "token_wise"
    scaling = run.model.rope_scaling
    short = parse_run_config([*files[:2], *mock]).train.seq_length
    assert scaling.original_max_position_embeddings == short
    assert scaling.factor == run.train.seq_length / short


def test_its_data(tmp_path: Path) -> None:
    """Rows and prompts have the lengths that were asked for; an answer stands once behind its key in the
    haystack, at its depth, and nowhere in that of the control."""
    sizes = ["8x64", "4x256", f"2x{LENGTH}"]
    subprocess.run([sys.executable, str(EXAMPLE / "haystacks.py"), str(tmp_path), *sizes], check=True)
    for length, rows in ((64, 8), (256, 4), (LENGTH, 2)):
        texts = [json.loads(line)["text"] for line in (tmp_path / f"{length}.jsonl").read_text().splitlines()]
        assert [len(text.split()) + 1 for text in texts] == [length] * rows
    prompts = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(prompts) == 3 * 2 * 15
    for prompt in prompts:
        length, depth, value, kind = prompt["id"].split()
        words = prompt["prompt"].split()
        assert len(words) + 1 == int(length)
        assert words[-2] == "find"
        places = [place for place, word in enumerate(words[:-1]) if word == words[-1]]
        assert len(places) == (kind == "needles")
        for place in places:
            assert (words[place - 1], words[place + 1]) == ("keep", value)
            assert abs(place / len(words) - float(depth)) < 0.1
