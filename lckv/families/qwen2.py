"""Qwen2 and Qwen2.5: biases of query, key and value; windows in some layers."""

from lckv.families.base import Family
from lckv.families.fields import COMMON_FIELDS, COMMON_FIXED, IGNORED, Fixed
from lckv.families.windows import WINDOW_PER_LAYER

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=COMMON_FIELDS,
    fixed=COMMON_FIXED
    | {"use_mrope": Fixed(False, "positions are those of a text, not of an image", written=False)},
    ignored=IGNORED,
    constants={"qkv_bias": True, "qk_norm": False},
    compression=WINDOW_PER_LAYER,
    token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    stock_type="qwen2",
)
