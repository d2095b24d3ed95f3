"""The configuration: what it reads, what it derives, and every message."""

from typing import Any

import pytest
import torch

from lckv.config import CompressionConfig
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.rope_scaling import LinearScaling, Llama3Scaling

SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4}


def made(**fields: Any) -> LCKVLlamaConfig:
    return LCKVLlamaConfig(**{**SIZES, **fields})


def test_defaults() -> None:
    config = made()
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert config.compression_config() == CompressionConfig()
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config.rope_scaling_config() is None


def test_published_configuration() -> None:
    """What the public LCKV models have in config.json; the window there means something only with an "s" in
    the map."""
    published = {
        "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "use_sequential": False,
        "rope_theta": 5e5, "rope_scaling": None,
        "forward_passes": 3, "backward_passes": 1, "sliding_window": 4096, "force_nodiag": True,
    }  # fmt: skip
    config = made(**published, layer_types="0_2_2_3")
    assert config.compression_config() == CompressionConfig("0_2_2_3", 3, 1, None, True)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert made(**published, layer_types="0_2s_2_3").compression_config().sliding_window == 4096
    assert made(**published, layer_types=None).compression_config() == CompressionConfig(
        None, 3, 1, None, True
    )


def test_policy() -> None:
    config = made(
        compression={"layer_types": "0_0_2_2", "policy": {"name": "dmc", "stage": "finetune", "window": None}}
    )
    assert config.compression_config() == CompressionConfig(
        "0_0_2_2", policy=DMCConfig(stage="finetune", window=None)
    )
    assert config.compression["policy"]["temperature"] == 0.1  # written out, whatever later defaults are


def test_rope_scaling() -> None:
    assert made(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling_config() == LinearScaling(2.0)
    llama3 = {
        "low_freq_factor": 1.0,
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = made(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert config.rope_scaling_config() == Llama3Scaling(8.0, 1.0, 4.0, 8192)


DMC = {"policy": {"name": "dmc", "stage": "finetune"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention_bias": True},
            "attention_bias is True; it must be False: true adds a bias to the output projection",
        ),
        ({"mlp_bias": True}, "mlp_bias is True; it must be False: the MLP here has no bias"),
        ({"layer_types": "0_0_2_2", "compression": {}}, "layer_types are given beside compression"),
        (
            {"layer_types": ["full_attention"] * 4},
            r"layer_types is \['full_.*; it must be the sharing map, .*marks? layers with",
        ),
        (
            {"layer_types": "0_0_2"},
            "compression.layer_types is '0_0_2'; it has 3 entries but the model has 4 layers",
        ),
        (
            {"compression": {"sliding_window": 8}},
            "compression.sliding_window is 8; no layer .* is marked with 's'",
        ),
        (
            {"compression": {"windows": 3}},
            "compression.windows is unknown; the fields are layer_types, ",
        ),
        (
            {"compression": {"policy": {"name": "h2o"}}},
            "compression.policy.name is 'h2o'; it must be one of dense, dmc",
        ),
        (
            {"compression": {"policy": {"name": "dmc", "ratio": 3}}},
            "compression.policy.ratio is unknown; ",
        ),
        (
            {"compression": {"policy": {"name": "dmc", "stage": "x"}}},
            "compression.policy.stage is 'x'; it must be one of",
        ),
        (
            {"compression": DMC, "attention_dropout": 0.1},
            "attention_dropout is 0.1; it must be 0 with the policy dmc",
        ),
        ({"compression": DMC, "head_dim": 2}, "head_dim is 2; it must be at least 4 with the policy dmc"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu': the MLP here is SwiGLU"),
        (
            {"num_attention_heads": 5},
            "hidden_size is 32; it must be a multiple of num_attention_heads, which is 5, or head_dim",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4; it must be a multiple of num_key_value_heads, which is 3",
        ),
        (
            {"num_key_value_heads": 0},
            "num_key_value_heads is 0; it must be at least 1",
        ),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            "rope_type is 'proportional'; it must be one of default, linear, llama3, dynamic, yarn, longrope",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "rope_parameters.factor is None; rope_type linear needs a number",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "(?s)low_freq_factor is None; rope_type llama3 needs.*high_freq_factor is None",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only whole heads can be rotated"),
    ],
)
def test_messages(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**fields)


def test_what_says_how_published_code_is_run_is_passed_over() -> None:
    config = made(use_sequential=True, pretraining_tp=2, hidden_act="swish")
    assert not hasattr(config, "use_sequential")


def test_a_decoder_there_and_back() -> None:
    config = made(
        compression={"layer_types": "0_0_2_2"}, dtype="bfloat16", eos_token_id=[3, 4], qk_norm=True,
        head_dim=6, rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
        tie_word_embeddings=True,
    )  # fmt: skip
    decoder = config.as_decoder()
    assert (decoder.rope_base, decoder.rope_scaling, decoder.dtype) == (
        5e4,
        LinearScaling(2.0),
        torch.bfloat16,
    )
    assert decoder.token_ids == {"bos_token_id": 1, "eos_token_id": [3, 4], "pad_token_id": None}
    again = LCKVLlamaConfig.from_decoder(decoder)
    assert again.as_decoder() == decoder
    assert again.to_dict() == config.to_dict()


def test_all_problems_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)hidden_act.*head_dim.*forward_passes"):
        made(hidden_act="relu", head_dim=3, compression={"forward_passes": -1})
