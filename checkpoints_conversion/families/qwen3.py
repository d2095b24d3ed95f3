"""Qwen3, the dense models: norms of query and key heads; windows in some layers."""

from dataclasses import replace

from checkpoints_conversion.families.base import Family
from checkpoints_conversion.families.fields import (
    COMMON_FIELDS,
    COMMON_FIXED,
    COMMON_WEIGHTS,
    IGNORED,
    LLAMA_FIXED,
    QK_NORM_WEIGHTS,
)
from checkpoints_conversion.families.windows import WINDOW_PER_LAYER

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=COMMON_FIELDS | {"head_dim": replace(COMMON_FIELDS["head_dim"], default=128)},
    fixed=COMMON_FIXED | {"attention_bias": LLAMA_FIXED["attention_bias"]},
    ignored=IGNORED,
    constants={"add_qkv_bias": False, "qk_layernorm": True},
    compression=WINDOW_PER_LAYER,
    weights=COMMON_WEIGHTS | QK_NORM_WEIGHTS,
    token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
)
