"""Mistral: Llama with a sliding window in all layers or in none."""

from checkpoints_conversion.families.base import Family
from checkpoints_conversion.families.fields import COMMON_FIELDS, COMMON_FIXED, COMMON_WEIGHTS, IGNORED
from checkpoints_conversion.families.windows import ONE_WINDOW

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    fields=COMMON_FIELDS,
    fixed=COMMON_FIXED,
    ignored=IGNORED,
    constants={"add_qkv_bias": False, "qk_layernorm": False},
    compression=ONE_WINDOW,
    weights=COMMON_WEIGHTS,
    token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
)
