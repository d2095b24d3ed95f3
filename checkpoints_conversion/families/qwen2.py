"""Qwen2 and Qwen2.5: biases of query, key and value; windows in some layers."""

from checkpoints_conversion.families.base import Family
from checkpoints_conversion.families.fields import (
    COMMON_FIELDS,
    COMMON_FIXED,
    COMMON_WEIGHTS,
    IGNORED,
    QKV_BIAS_WEIGHTS,
    Fixed,
)
from checkpoints_conversion.families.windows import WINDOW_PER_LAYER

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=COMMON_FIELDS,
    fixed=COMMON_FIXED
    | {"use_mrope": Fixed(False, "positions are those of a text, not of an image", written=False)},
    ignored=IGNORED,
    constants={"add_qkv_bias": True, "qk_layernorm": False},
    compression=WINDOW_PER_LAYER,
    weights=COMMON_WEIGHTS | QKV_BIAS_WEIGHTS,
    token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
)
