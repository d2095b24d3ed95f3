"""Tiny models with random weights, large enough that every layer matters to the logits."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from lckv.policies.dmc.config import DMCConfig

PLAIN, SHARED, CYCLIC, TWO_GROUPS = None, "0_0_2_2", "0_3_3_3", "1_1_3_3_4"
WINDOWS, CYCLIC_WINDOWS = "0s_1s_2_2", "0_3s_3s_3"
MIXED, MIXED_CYCLIC = "0_1+0_2+1s_2", "0_2_2+0_3+2"
TWO_SOURCES = ("0_1+0_2_2/0_2+1_1+2",)
MAPS = (PLAIN, SHARED, CYCLIC, TWO_GROUPS, WINDOWS, CYCLIC_WINDOWS)
ACYCLIC = (PLAIN, SHARED, WINDOWS)

MERGING = DMCConfig(stage="finetune", initial_decision_bias=0.25, window=3)
"""Merges about two of five tokens of a model with random weights."""


def config(
    layer_types: str | None = PLAIN, policy: DMCConfig | None = None, **fields: Any
) -> LCKVLlamaConfig:
    """Three or more layers; so many passes that prompts of up to 12 tokens are exact on any map; a window of
    3 where there is one."""
    compression = {
        "layer_types": layer_types,
        "forward_passes": fields.pop("forward_passes", 10),
        "backward_passes": fields.pop("backward_passes", 2),
        "force_nodiag": fields.pop("force_nodiag", False),
        "sliding_window": 3 if layer_types and "s" in layer_types else None,
        **({} if policy is None else {"policy": asdict(policy)}),
    }
    sizes = {
        "num_hidden_layers": 3 if layer_types is None else layer_types.count("_") + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LCKVLlamaConfig(**{**sizes, **fields}, compression=compression)


def model(
    layer_types: str | None = PLAIN, policy: DMCConfig | None = None, **fields: Any
) -> LCKVLlamaForCausalLM:
    """In evaluation; always the same weights."""
    torch.manual_seed(0)
    made = LCKVLlamaForCausalLM(config(layer_types, policy, **fields)).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            if layer.self_attn.mixes is not None:  # weights with which the mixture is another than the own
                layer.self_attn.key_weight.copy_(torch.tensor([0.5, 0.8]) / 35)
                layer.self_attn.value_weight.copy_(torch.tensor([-0.6, 1.1]) / 35)
    return made


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """int64 [rows, length], none of them the padding token."""
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to float32 rounding at a scale of about 1."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
