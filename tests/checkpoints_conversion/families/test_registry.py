"""Which family a model belongs to."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.families.registry import describe, export_family, family_of
from checkpoints_conversion.tensors import ConversionError, TensorInfo
from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ModelConfig
from tests.checkpoints_conversion.families.published_configs import LLAMA_2_13B, PUBLISHED

PLAIN = ModelDescription(
    model=ModelConfig(num_layers=3, vocab_size=32, max_position_embeddings=32),
    compression=CompressionConfig(),
    family="llama",
    dtype=torch.float32,
)


@pytest.mark.parametrize(
    ("family", "model", "compression", "expected"),
    [
        ("llama", {}, {}, "llama"),
        ("llama", {}, {"layer_types": "0_1_2", "forward_passes": 1}, "llama"),
        ("mistral", {}, {}, "mistral"),
        ("lckv-llama", {}, {}, "llama"),
        ("qwen2", {}, {}, "llama"),
        ("llama", {"add_qkv_bias": True}, {}, "qwen2"),
        ("llama", {"qk_layernorm": True}, {}, "qwen3"),
        ("llama", {"qk_layernorm": True, "add_qkv_bias": True}, {}, "lckv-llama"),
        ("llama", {}, {"layer_types": "0s_1s_2s", "sliding_window": 4}, "mistral"),
        ("llama", {}, {"layer_types": "0s_1_2s", "sliding_window": 4}, "lckv-llama"),
        ("llama", {"add_qkv_bias": True}, {"layer_types": "0s_1_2s", "sliding_window": 4}, "qwen2"),
        ("llama", {"hidden_size": 250, "kv_channels": 64}, {}, "mistral"),
        ("llama", {}, {"layer_types": "0_0_2"}, "lckv-llama"),
        ("llama", {}, {"layer_types": "0_2_2"}, "lckv-llama"),
        ("qwen2", {"add_qkv_bias": True}, {"layer_types": "0_0_2"}, "lckv-llama"),
        ("llama", {}, {"force_nodiag": True}, "lckv-llama"),
        ("llama", {}, {"policy": DMCConfig()}, "lckv-llama"),
    ],
)
def test_stock_software_runs_what_it_can(
    family: str, model: dict[str, Any], compression: dict[str, Any], expected: str
) -> None:
    description = replace(
        PLAIN,
        family=family,
        model=replace(PLAIN.model, **model),
        compression=CompressionConfig(**compression),
    )
    chosen = export_family(description)
    assert chosen.name == expected
    assert chosen.read_config(chosen.write_config(description)).model == description.model


def test_unknown_families_are_refused() -> None:
    assert {family_of(config["model_type"]).name for config in PUBLISHED.values()} == {
        "llama", "mistral", "qwen2", "qwen3", "lckv-llama"
    }  # fmt: skip
    for name in ("gpt2", None, ["llama"]):
        with pytest.raises(
            ConversionError, match=r"model_type is .*; models of llama, mistral, qwen2, qwen3, lckv-llama"
        ):
            describe({"model_type": name}, {})
    with pytest.raises(ConversionError, match="model_type is 'mistral'; it must be 'llama'"):
        family_of("llama").read_config(LLAMA_2_13B | {"model_type": "mistral"})


def test_the_dtype_is_that_of_most_weights() -> None:
    tensors = {
        "small": TensorInfo((2, 2), torch.float32),
        "large": TensorInfo((9, 9), torch.bfloat16),
        "frequencies": TensorInfo((99, 99), torch.int64),
    }
    assert describe(LLAMA_2_13B, tensors).dtype == torch.bfloat16
    assert describe(LLAMA_2_13B, {}).dtype == torch.float16
