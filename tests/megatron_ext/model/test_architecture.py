"""What defines a model, and how it is set."""

from dataclasses import replace

import pytest

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, RopeScalingConfig, RunConfig
from megatron_ext.model.architecture import ARCHITECTURE, architecture, setting_of
from megatron_ext.settings import settings_of


@pytest.mark.parametrize(
    ("scaling", "defining"),
    [
        (RopeScalingConfig(), None),
        (RopeScalingConfig("linear"), {"type": "linear", "factor": 8.0}),
        (
            RopeScalingConfig("llama3", 4.0),
            {
                "type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (RopeScalingConfig("dynamic", 2.0), {"type": "dynamic", "factor": 2.0}),
    ],
)  # fmt: skip
def test_of_a_scaling_only_what_it_has_defines_a_model(
    scaling: RopeScalingConfig, defining: dict[str, object] | None
) -> None:
    """So that checkpoints that know no other scalings are resumed."""
    model = replace(ModelConfig(), rope_scaling=scaling)
    assert architecture(model, CompressionConfig(), vocab_size=7)["rope_scaling"] == defining


def test_every_field_names_the_setting_behind_it() -> None:
    longrope = RopeScalingConfig(type="longrope", short_factor=(1.0,), long_factor=(2.0,))
    model = replace(ModelConfig(), rope_scaling=longrope)
    known = architecture(model, CompressionConfig(), vocab_size=7)
    names = [f"{ARCHITECTURE}.{name}" for name in known]
    names += [f"{ARCHITECTURE}.rope_scaling.{name}" for name in known["rope_scaling"]]
    settings = settings_of(RunConfig)
    unknown = [name for name in map(setting_of, names) if name not in settings]
    assert unknown == ["model.rope_scaling"], "whose fields are settings"
    assert setting_of("architecture.layer_types") == "compression.layer_types"
    assert setting_of("architecture.hidden_size") == "model.hidden_size"


@pytest.mark.parametrize(
    ("layer_types", "mixes"),
    [("0_1+0_2_2", True), ("0_1_1+0_1", True), ("0_1_1/0_1", False), ("0_1_2_2", False)],
)
def test_the_factor_of_mixing_defines_a_model_that_mixes(layer_types: str, mixes: bool) -> None:
    """In layers that mix into their own and in those that read a mixture."""
    compression = CompressionConfig(layer_types=layer_types)
    known = architecture(replace(ModelConfig(), num_layers=4), compression, vocab_size=7)
    assert ("mix_scaling_factor" in known) == mixes
