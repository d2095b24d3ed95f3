"""Which family a model belongs to."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.families.decoder import Decoder
from lckv.families.registry import describe, export_family, family_of
from lckv.policies.dmc.config import DMCConfig
from lckv.weights.tensors import TensorInfo
from tests.lckv.families.published_configs import LLAMA_2_13B, PUBLISHED

PLAIN = Decoder(
    family="llama",
    vocab_size=32,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=32,
    token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
)


@pytest.mark.parametrize(
    ("family", "model", "compression", "expected"),
    [
        ("llama", {}, {}, "llama"),
        ("llama", {}, {"layer_types": "0_1_2", "forward_passes": 1}, "llama"),
        ("mistral", {}, {}, "mistral"),
        ("lckv-llama", {}, {}, "llama"),
        ("qwen2", {}, {}, "llama"),
        ("llama", {"qkv_bias": True}, {}, "qwen2"),
        ("llama", {"qk_norm": True}, {}, "qwen3"),
        ("llama", {"qk_norm": True, "qkv_bias": True}, {}, "lckv-llama"),
        ("llama", {}, {"layer_types": "0s_1s_2s", "sliding_window": 4}, "mistral"),
        ("llama", {}, {"layer_types": "0s_1_2s", "sliding_window": 4}, "lckv-llama"),
        ("llama", {"qkv_bias": True}, {"layer_types": "0s_1_2s", "sliding_window": 4}, "qwen2"),
        ("llama", {"hidden_size": 250}, {}, "mistral"),
        ("llama", {}, {"layer_types": "0_0_2"}, "lckv-llama"),
        ("llama", {}, {"layer_types": "0_2_2"}, "lckv-llama"),
        ("qwen2", {"qkv_bias": True}, {"layer_types": "0_0_2"}, "lckv-llama"),
        ("llama", {}, {"force_nodiag": True}, "lckv-llama"),
        ("llama", {}, {"policy": DMCConfig()}, "lckv-llama"),
    ],
)
def test_stock_software_runs_what_it_can(
    family: str, model: dict[str, Any], compression: dict[str, Any], expected: str
) -> None:
    decoder = replace(PLAIN, family=family, **model, compression=CompressionConfig(**compression))
    chosen = export_family(decoder)
    assert chosen.name == expected
    again = chosen.read_config(chosen.write_config(decoder))
    assert replace(again, family=family, compression=decoder.compression) == decoder


def test_unknown_families_are_refused() -> None:
    assert {family_of(config["model_type"]).name for config in PUBLISHED.values()} == {
        "llama", "mistral", "qwen2", "qwen3", "lckv-llama"
    }  # fmt: skip
    for name in ("gpt2", None, ["llama"]):
        with pytest.raises(
            ModelError, match=r"model_type is .*; models of these types can be read: llama, mistral, "
        ):
            describe({"model_type": name}, {})
    with pytest.raises(ModelError, match="model_type is 'mistral'; it must be 'llama'"):
        family_of("llama").read_config(LLAMA_2_13B | {"model_type": "mistral"})


def test_the_dtype_is_that_of_most_weights() -> None:
    tensors = {
        "small": TensorInfo((2, 2), torch.float32),
        "large": TensorInfo((9, 9), torch.bfloat16),
        "frequencies": TensorInfo((99, 99), torch.int64),
    }
    assert describe(LLAMA_2_13B, tensors).dtype == torch.bfloat16
    assert describe(LLAMA_2_13B, {}).dtype == torch.float16
