"""Mistral: Llama with a sliding window in all layers or in none."""

from lckv.families.base import Family
from lckv.families.fields import COMMON_FIELDS, COMMON_FIXED, IGNORED
from lckv.families.windows import ONE_WINDOW

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    fields=COMMON_FIELDS,
    fixed=COMMON_FIXED,
    ignored=IGNORED,
    constants={"qkv_bias": False, "qk_norm": False},
    compression=ONE_WINDOW,
    token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    stock_type="mistral",
)
