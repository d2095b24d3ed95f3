"""The settings that define a model: a checkpoint of one set of them is not one of another."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, RopeScalingConfig

ARCHITECTURE = "architecture"
"""The key of what `architecture` returns, where checkpoints keep it."""
_POSITIONS = ("rotary_base", "rope_scaling")
"""Fields without weights, which say what positions are: longer contexts need others."""


def architecture(model: ModelConfig, compression: CompressionConfig, *, vocab_size: int) -> dict[str, Any]:
    """What weights and outputs depend on, with defaults resolved; how often a plan iterates, kernels and
    dropout are left out, and what a KV policy may follow on (`training/succession.py`)."""
    fields = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "vocab_size": vocab_size,
        "rotary_base": model.rotary_base,
        "rope_scaling": _rope_scaling(model.rope_scaling),
        "layernorm_epsilon": model.layernorm_epsilon,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "layer_types": str(compression.family(model.num_layers)),
        "sliding_window": compression.sliding_window,
        "force_nodiag": compression.force_nodiag,
        "first_guess": compression.first_guess,
    }
    if compression.family(model.num_layers).stored.any_mixed:  # other models' checkpoints stay as they are
        fields["mix_scaling_factor"] = compression.mix_scaling_factor
    return fields


def but_positions(defining: Mapping[str, Any]) -> dict[str, Any]:
    """What `architecture` returns without the fields that may change where a run takes only weights."""
    return {name: value for name, value in defining.items() if name not in _POSITIONS}


def changed_positions(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Those fields where two of what `architecture` returns differ, as sentences without an end."""
    return [
        f"{setting_of(name)} is {here[name]}, and was {before[name]} in the checkpoint"
        for name in _POSITIONS
        if name in before and before[name] != here[name]
    ]


def _rope_scaling(config: RopeScalingConfig) -> dict[str, Any] | None:
    scaling = config.scaling
    return None if scaling is None else {"type": config.type, **asdict(scaling)}


def setting_of(field: str) -> str:
    """The setting that decides on `field`, such as architecture.layer_types, of what checkpoints keep."""
    name = field.removeprefix(f"{ARCHITECTURE}.")
    of_model = name.partition(".")[0] in {entry.name for entry in fields(ModelConfig)}
    return f"{'model' if of_model else 'compression'}.{name}"
