"""The description of a model and its JSON."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_conversion.description import ModelDescription, dtype_of
from checkpoints_conversion.tensors import WEIGHT_DTYPES, ConversionError
from lckv.config import CompressionConfig
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ModelConfig, RopeScalingConfig
from megatron_ext.errors import ConfigError

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


@pytest.mark.parametrize(
    ("compression", "plain"),
    [
        (CompressionConfig(), True),
        (CompressionConfig("0_1_2_3"), True),
        (CompressionConfig("0s_1_2_3", sliding_window=4), True),
        (CompressionConfig("0_0_2_3"), False),
        (CompressionConfig("0_3_3_3"), False),
        (CompressionConfig(force_nodiag=True), False),
        (CompressionConfig(policy=DMCConfig()), False),
    ],
)
def test_plain(compression: CompressionConfig, plain: bool) -> None:
    assert replace(DESCRIPTION, compression=compression).is_plain == plain


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
        ({"dtype": "int4"}, "dtype is 'int4'; weights of float32, bfloat16, float16 can be converted"),
        ({"extra": 1}, "'extra'"),
        ({"model": {"num_layer": 4}}, "model: num_layer is unknown; did you mean num_layers?"),
        ({"compression": {"policy": {"name": "h2o"}}}, "compression: policy.name is 'h2o'"),
    ],
)
def test_descriptions_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelDescription.from_json(DESCRIPTION.to_json() | change)
    assert message in str(caught.value)


def test_dtype_of() -> None:
    assert [dtype_of(str(dtype), "x") for dtype in WEIGHT_DTYPES] == list(WEIGHT_DTYPES)
    assert dtype_of(torch.float16, "x") == torch.float16
