"""On a plain map the model is transformers' own of the same family, with the same weights under the same
names."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.lckv.models.test_modeling import padded
from tests.lckv.models.tiny import close, config, tokens
from tests.lckv.rope_parameters import longrope

_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 100.0,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0,
    "mscale": 3.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}
"""Texts of these tests are longer than the contexts of pretraining, and begin shorter."""
CASES: dict[str, tuple[type, type, str | None, dict[str, Any], dict[str, Any]]] = {
    # transformers' classes, the map, what both configurations have, what only ours has
    "llama": (LlamaConfig, LlamaForCausalLM, None, {}, {}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        None,
        {"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
        {},
    ),
    "linear": (LlamaConfig, LlamaForCausalLM, None, {"rope_parameters": _LINEAR, "head_dim": 12}, {}),
    "qwen2 yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        None,
        {"rope_parameters": _YARN, "num_key_value_heads": 4},
        {"qkv_bias": True},
    ),
    "mistral longrope": (
        MistralConfig,
        MistralForCausalLM,
        "0s_1s_2s",
        {"rope_parameters": {"rope_theta": 100.0, **longrope(8, 16)}, "max_position_embeddings": 64},
        {},
    ),
    "qwen3 dynamic": (
        Qwen3Config,
        Qwen3ForCausalLM,
        None,
        {"head_dim": 16, "rope_parameters": _DYNAMIC, "max_position_embeddings": 16},
        {"qk_norm": True},
    ),
    "llama longrope": (
        LlamaConfig,
        LlamaForCausalLM,
        None,
        {"rope_parameters": {"rope_theta": 100.0, **longrope(8, 8)}, "max_position_embeddings": 32},
        {},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, None, {"num_key_value_heads": 4}, {"qkv_bias": True}),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        None,
        {"head_dim": 16, "num_key_value_heads": 1},
        {"qk_norm": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, "0s_1s_2s", {}, {}),
}


def pair(name: str) -> tuple[PreTrainedModel, LCKVLlamaForCausalLM]:
    config_class, model_class, layer_types, shared, own = CASES[name]
    mine = config(layer_types, **shared, **own)
    fields = {name: getattr(mine, name) for name in (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
        "rms_norm_eps",
    )}  # fmt: skip
    window = {"sliding_window": 3} if config_class is MistralConfig else {}
    torch.manual_seed(0)
    theirs = model_class(config_class(**{**fields, **shared, **window}))
    with torch.no_grad():  # norms and biases start as ones and zeros
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    ours = LCKVLlamaForCausalLM(mine)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name: str) -> None:
    theirs, ours = pair(name)
    ids = tokens(2, 20)
    expected, found = theirs(ids, labels=ids), ours(ids, labels=ids)
    close(found.logits, expected.logits)
    close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    gradients = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        close(parameter.grad, gradients[parameter_name].grad)
        assert parameter.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", CASES)
def test_generation(name: str) -> None:
    theirs, ours = pair(name)
    ids, mask = padded([tokens(1, 7, seed=1)[0], tokens(1, 3, seed=2)[0]], [0, 4], 7)
    for options in ({}, {"num_beams": 2}):
        sequences = [
            each.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
            for each in (theirs, ours)
        ]
        assert torch.equal(*sequences)
