"""Conversion of a model under a KV policy that the product does not know: one that exists only in the
tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion import __main__ as program
from checkpoints_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoints_conversion.megatron_logits import write_logits
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.lckv.families.tiny_models import saved_model
from tests.ranks import run_on_ranks

CHANGES = {
    "compression.policy.name": "forgetful",
    "compression.policy.age": "5",
    "compression.layer_types": "0_0_2",
}


@pytest.fixture(autouse=True)
def _megatron_in_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*arguments: Any, layer_types: str | None, timeout_seconds: float) -> None:
        run_on_ranks(1, write_logits, *arguments, layer_types, timeout=timeout_seconds)

    monkeypatch.setattr("checkpoints_conversion.verify.compute", compute)


def test_there_and_back_with_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    saved_model(original, "llama")
    hf_to_megatron(str(original), megatron, changes=CHANGES, proof="always")
    megatron_to_hf(megatron, back, proof="always")
    model = LCKVLlamaForCausalLM.from_pretrained(back)
    assert (model.model.policy.name, model.model.policy.config.age) == ("forgetful", 5)
    tokens = torch.arange(12)[None]
    assert set(model(tokens, use_cache=False).statistics) == {"forgotten", "key_size"}
    card = (back / "README.md").read_text()
    assert "Policy: Beyond 5 tokens only every 2th token is kept." in card
    assert "- Nobody. *On forgetting.* Never published." in card
    for folder in (megatron, back):
        assert program.main(["inspect", str(folder)]) == 0
        said = capsys.readouterr().out
        assert "policy              forgetful: every 2th token stays beyond 5 tokens" in said
        assert "at the 2 tokens per slot that training aims at" in said
