"""What defines a model, and how it is set."""

from dataclasses import replace

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, RopeScalingConfig, RunConfig
from megatron_ext.model.architecture import ARCHITECTURE, architecture, setting_of
from megatron_ext.settings import settings_of


def test_every_field_names_the_setting_behind_it() -> None:
    model = replace(ModelConfig(), rope_scaling=RopeScalingConfig(type="linear"))
    known = architecture(model, CompressionConfig(), vocab_size=7)
    names = [f"{ARCHITECTURE}.{name}" for name in known]
    names += [f"{ARCHITECTURE}.rope_scaling.{name}" for name in known["rope_scaling"]]
    settings = settings_of(RunConfig)
    unknown = [name for name in map(setting_of, names) if name not in settings]
    assert unknown == ["model.rope_scaling"], "whose fields are settings"
    assert setting_of("architecture.layer_types") == "compression.layer_types"
    assert setting_of("architecture.hidden_size") == "model.hidden_size"
