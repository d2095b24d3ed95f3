"""A Hugging Face folder and a checkpoint that were written before readers moved to `lckv` still load, and
give the logits of then: in the engine, in transformers, in the converter, in the training model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_conversion.opening import open_huggingface, open_megatron
from checkpoints_conversion.reference import differences
from lckv.generation.loading import load_model
from lckv.models import register
from megatron_ext.config import ParallelConfig
from megatron_ext.evaluation.logits import compute_logits
from megatron_ext.parallel import process_groups
from megatron_ext.restoring.model import restore
from tests.ranks import run_on_ranks

FOLDER = Path(__file__).parents[1] / "fixtures" / "round_one"
HUGGING_FACE, CHECKPOINT = FOLDER / "huggingface", FOLDER / "checkpoint"


@pytest.fixture(scope="module")
def then() -> dict[str, Tensor]:
    """tokens int64 [2, 24] and logits float32 [2, 24, 96]."""
    return load_file(FOLDER / "logits.safetensors")


def _assert_same(logits: Tensor, then: dict[str, Tensor]) -> None:
    """Up to the order in which products are summed."""
    torch.testing.assert_close(logits.float(), then["logits"], rtol=0, atol=1e-5)


def test_the_engine(then: dict[str, Tensor]) -> None:
    model, _ = load_model(HUGGING_FACE, device="cpu")
    with torch.inference_mode():
        _assert_same(model(then["tokens"]).logits, then)


def test_transformers(then: dict[str, Tensor]) -> None:
    register()
    model = AutoModelForCausalLM.from_pretrained(HUGGING_FACE).eval()
    with torch.inference_mode():
        _assert_same(model(then["tokens"]).logits, then)


def test_the_converter() -> None:
    folder, checkpoint = open_huggingface(HUGGING_FACE), open_megatron(CHECKPOINT)
    assert not differences(folder.description, checkpoint.description)
    assert folder.record is not None and folder.record.source.format == "megatron"
    assert dict(folder.source.infos()) == dict(checkpoint.source.infos())
    for name in folder.source.infos():
        assert torch.equal(folder.source.read(name), checkpoint.source.read(name)), name


def _restored_logits(tokens: Tensor) -> Tensor | None:
    parallel = ParallelConfig()
    process_groups.initialize(parallel, seed=1)
    return compute_logits(restore(CHECKPOINT, parallel).stage, tokens)


def test_the_training_model(then: dict[str, Tensor]) -> None:
    logits = run_on_ranks(1, _restored_logits, then["tokens"])[0]
    _assert_same(logits, then)
