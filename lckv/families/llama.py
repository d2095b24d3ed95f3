"""Llama 1, 2 and 3.x, and whatever else says that it is a Llama (SmolLM)."""

from lckv.families.base import Family
from lckv.families.fields import IGNORED, LLAMA_FIELDS, LLAMA_FIXED
from lckv.families.windows import NO_WINDOWS

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=LLAMA_FIELDS,
    fixed=LLAMA_FIXED,
    ignored=IGNORED,
    constants={"qkv_bias": False, "qk_norm": False},
    compression=NO_WINDOWS,
    token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    stock_type="llama",
    divides_heads=True,
)
