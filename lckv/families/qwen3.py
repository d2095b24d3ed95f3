"""Qwen3, the dense models: norms of query and key heads; windows in some layers."""

from dataclasses import replace

from lckv.families.base import Family
from lckv.families.fields import COMMON_FIELDS, COMMON_FIXED, IGNORED, LLAMA_FIXED
from lckv.families.windows import WINDOW_PER_LAYER

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=COMMON_FIELDS | {"head_dim": replace(COMMON_FIELDS["head_dim"], default=128)},
    fixed=COMMON_FIXED | {"attention_bias": LLAMA_FIXED["attention_bias"]},
    ignored=IGNORED,
    constants={"qkv_bias": False, "qk_norm": True},
    compression=WINDOW_PER_LAYER,
    token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    stock_type="qwen3",
)
