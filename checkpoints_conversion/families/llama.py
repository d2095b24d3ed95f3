"""Llama 2 and 3.x, and whatever else says that it is a Llama (SmolLM)."""

from checkpoints_conversion.families.base import Family
from checkpoints_conversion.families.fields import COMMON_WEIGHTS, IGNORED, LLAMA_FIELDS, LLAMA_FIXED
from checkpoints_conversion.families.windows import NO_WINDOWS

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=LLAMA_FIELDS,
    fixed=LLAMA_FIXED,
    ignored=IGNORED,
    constants={"add_qkv_bias": False, "qk_layernorm": False},
    compression=NO_WINDOWS,
    weights=COMMON_WEIGHTS,
    token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    divides_heads=True,
)
