"""The description of a model and its JSON."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.families.registry import describe
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.weights.tensors import WEIGHT_DTYPES, TensorInfo
from megatron_ext.config import ModelConfig, ParallelConfig, RopeScalingConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.initialization import global_parameters
from megatron_ext.parallel import process_groups
from tests.lckv.families.published_configs import PUBLISHED
from tests.ranks import run_on_ranks

DESCRIPTION = ModelDescription(
    model=ModelConfig(num_layers=4, vocab_size=100, max_position_embeddings=64),
    compression=CompressionConfig("0_3_3_3", policy=DMCConfig(stage="finetune", window=None, eps=1e-3)),
    family="lckv-llama",
    dtype=torch.bfloat16,
    token_ids={"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None},
)


@given(
    dtype=st.sampled_from(WEIGHT_DTYPES),
    base=st.floats(1, 1e7),
    epsilon=st.floats(1e-9, 1e-2),
    scaling=st.builds(RopeScalingConfig, st.sampled_from(["none", "linear", "llama3"]), st.floats(1, 64)),
    policy=st.one_of(st.builds(DenseConfig), st.builds(DMCConfig, window=st.none() | st.integers(1, 9))),
    layer_types=st.sampled_from([None, "0_0_2_2", "3_3_3_3"]),
    tied=st.booleans(),
)
def test_json_loses_nothing(
    dtype: torch.dtype,
    base: float,
    epsilon: float,
    scaling: RopeScalingConfig,
    policy: Any,
    layer_types: Any,
    tied: bool,
) -> None:
    model = replace(
        DESCRIPTION.model, rotary_base=base, layernorm_epsilon=epsilon, rope_scaling=scaling,
        untie_embeddings_and_output_weights=not tied,
    )  # fmt: skip
    compression = CompressionConfig(layer_types, policy=policy)
    description = replace(DESCRIPTION, model=model, compression=compression, dtype=dtype)
    assert ModelDescription.from_json(json.loads(json.dumps(description.to_json()))) == description


def test_defaults_that_depend_on_others_are_filled_in() -> None:
    assert (
        DESCRIPTION.model.ffn_hidden_size,
        DESCRIPTION.model.num_query_groups,
        DESCRIPTION.model.kv_channels,
    ) == (
        704,
        4,
        64,
    )
    assert DESCRIPTION.vocab_size == 100


def test_incomplete_and_impossible_models_are_refused() -> None:
    with pytest.raises(
        ConversionError, match=r"model.vocab_size is None and model.max_position_embeddings is 64"
    ):
        replace(DESCRIPTION, model=replace(DESCRIPTION.model, vocab_size=None))
    with pytest.raises(ConversionError, match=r"it has 2 entries but the model has 4 layers"):
        replace(DESCRIPTION, compression=CompressionConfig("0_1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int4"}, "dtype is 'int4'; weights of float32, bfloat16, float16 can be read"),
        ({"extra": 1}, "'extra'"),
        ({"model": {"num_layer": 4}}, "model.num_layer is unknown; did you mean model.num_layers?"),
        ({"compression": {"policy": {"name": "h2o"}}}, "compression.policy.name is 'h2o'"),
    ],
)
def test_descriptions_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        ModelDescription.from_json(DESCRIPTION.to_json() | change)
    assert message in str(caught.value)


CASES = [
    ({}, {}),
    ({"num_query_groups": 1, "untie_embeddings_and_output_weights": False}, {}),
    ({"add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 6}, {"layer_types": "0_3_3_3"}),
    ({"add_qkv_bias": True}, {"layer_types": "0s_0s_2_2", "sliding_window": 3}),
]


def _model(settings: dict) -> ModelConfig:
    sizes = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 32,
    }
    return ModelConfig(**(sizes | {"make_vocab_size_divisible_by": 1} | settings))


def _parameters() -> list[dict[str, TensorInfo]]:
    process_groups.initialize(ParallelConfig(), seed=1)
    train = TrainConfig(precision="fp32")
    found = []
    for settings, compression in CASES:
        stage = build_stage(
            _model(settings), CompressionConfig(**compression), ParallelConfig(), train, vocab_size=32
        )
        found.append({name: TensorInfo(tuple(p.shape), p.dtype) for name, p in global_parameters(stage)})
    return found


def test_expected_tensors_are_the_parameters_of_the_training_model() -> None:
    for (settings, compression), parameters in zip(CASES, run_on_ranks(1, _parameters)[0], strict=True):
        model = replace(_model(settings), max_position_embeddings=8)
        description = ModelDescription(model, CompressionConfig(**compression), "lckv-llama", torch.float32)
        assert description.expected_tensors() == parameters


@given(
    scaling=st.sampled_from(
        [
            RopeScalingConfig(),
            RopeScalingConfig("linear", 2.0),
            RopeScalingConfig("llama3", 4.0, 1.0, 3.0, 64),
            RopeScalingConfig("dynamic", 3.0),
            RopeScalingConfig(
                "yarn",
                4.0,
                original_max_position_embeddings=64,
                attention_factor=1.5,
                beta_fast=16.0,
                beta_slow=2.0,
                mscale=0.7,
                mscale_all_dim=1.0,
                truncate=False,
            ),
            RopeScalingConfig("yarn", 4.0, original_max_position_embeddings=64),
            RopeScalingConfig(
                "longrope",
                original_max_position_embeddings=64,
                short_factor=(1.0, 2.0),
                long_factor=(1.5, 3.0),
            ),
        ]
    ),
    tied=st.booleans(),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1]),
)
def test_a_decoder_there_and_back(scaling: RopeScalingConfig, tied: bool, bias: bool, dropout: float) -> None:
    model = replace(
        DESCRIPTION.model, rope_scaling=scaling, untie_embeddings_and_output_weights=not tied,
        add_qkv_bias=bias, qk_layernorm=not bias, attention_dropout=dropout, rotary_base=5e5,
        init_method_std=0.3,
    )  # fmt: skip
    description = replace(DESCRIPTION, model=model)
    decoder = description.decoder()
    assert (decoder.tie_word_embeddings, decoder.qkv_bias, decoder.attention_dropout) == (tied, bias, dropout)
    assert ModelDescription.of_decoder(decoder) == description


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_as_descriptions(name: str) -> None:
    decoder = describe(PUBLISHED[name], {})
    description = ModelDescription.of_decoder(decoder)
    assert description.decoder() == decoder
    assert ModelDescription.from_json(json.loads(json.dumps(description.to_json()))) == description
