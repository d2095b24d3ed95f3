"""lckv-llama: every sharing map and policy, with this project's model class; and the published LCKV models.

A config of this project has qkv_bias, qk_norm and the section compression. The published ones (Wu and Tu, ACL
2024) have the same model_type and the fields of the section beside those of Llama, the map as a text under
the key layer_types.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from checkpoints_conversion.families.base import Family
from checkpoints_conversion.families.fields import (
    COMMON_WEIGHTS,
    IGNORED,
    LLAMA_FIELDS,
    LLAMA_FIXED,
    QK_NORM_WEIGHTS,
    QKV_BIAS_WEIGHTS,
    Field,
)
from checkpoints_conversion.families.windows import CompressionFields
from lckv.config import CompressionConfig
from megatron_ext.errors import ConfigError
from megatron_ext.settings import read
from megatron_ext.validation.layout import compression_problems

_PUBLISHED_FIELDS = ("layer_types", "forward_passes", "backward_passes", "sliding_window", "force_nodiag")
_PUBLISHED_WINDOW = 4096
"""What the published code assumes where a config gives no window."""


def _config_problems(config: Mapping[str, Any], num_layers: int) -> Iterator[str]:
    beside = [name for name in _PUBLISHED_FIELDS if config.get(name) is not None]
    if config.get("compression") is not None and beside:
        yield (
            f"{', '.join(beside)} are given beside compression; only the latter belongs into a config of "
            "this project."
        )
    try:
        yield from compression_problems(_read(config, num_layers), num_layers)
    except ConfigError as error:
        yield from str(error).splitlines()


def _read(config: Mapping[str, Any], num_layers: int) -> CompressionConfig:
    if config.get("compression") is not None:
        return read(CompressionConfig, [("compression: ", config["compression"])])
    given = {name: config[name] for name in _PUBLISHED_FIELDS if config.get(name) is not None}
    if "s" in str(given.get("layer_types")):
        given.setdefault("sliding_window", _PUBLISHED_WINDOW)
    else:
        given.pop("sliding_window", None)  # the published code writes it into every config
    return read(CompressionConfig, [("", given)])


def _no_problems(compression: CompressionConfig, num_layers: int) -> Iterator[str]:
    yield from ()


def _write(compression: CompressionConfig, num_layers: int) -> dict[str, Any]:
    return {"compression": asdict(compression) | {"layer_types": str(compression.map(num_layers))}}


LCKV_LLAMA = Family(
    name="lckv-llama",
    architecture="LCKVLlamaForCausalLM",
    fields=LLAMA_FIELDS
    | {
        "qkv_bias": Field("add_qkv_bias", bool, default=False),
        "qk_norm": Field("qk_layernorm", bool, default=False),
    },
    fixed={name: fixed for name, fixed in LLAMA_FIXED.items() if name != "auto_map"},
    ignored=IGNORED
    | {
        "auto_map": "the model class, for where this project is not installed",
        "use_sequential": "how the published code is run",
    },
    constants={},
    compression=CompressionFields(
        names=("compression", *_PUBLISHED_FIELDS),
        config_problems=_config_problems,
        read=_read,
        problems=_no_problems,
        write=_write,
    ),
    weights=COMMON_WEIGHTS
    | QKV_BIAS_WEIGHTS
    | QK_NORM_WEIGHTS
    | {
        "decoder.layers.{}.self_attention.linear_q.weight": ("model.layers.{}.self_attn.q_proj.weight",),
        "decoder.layers.{}.self_attention.linear_q.bias": ("model.layers.{}.self_attn.q_proj.bias",),
    },
    token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    old_spelling=False,
)
