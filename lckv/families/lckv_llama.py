"""lckv-llama: every sharing map and policy, with this project's model class; and the published LCKV models.

A config of this project has qkv_bias, qk_norm and the section compression. The published ones have the same
model_type and the fields of the section beside those of Llama (`published_lckv.py`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lckv.config import CompressionConfig
from lckv.families.base import Family
from lckv.families.fields import COMMON_FIELDS, IGNORED, LLAMA_FIELDS, LLAMA_FIXED, Field
from lckv.families.published_lckv import PUBLISHED_FIELDS, compression_of
from lckv.families.windows import CompressionFields


def _read(config: Mapping[str, Any], num_layers: int) -> CompressionConfig:
    return compression_of(config)


def _no_problems(compression: CompressionConfig, num_layers: int) -> Iterator[str]:
    yield from ()


def _write(compression: CompressionConfig, num_layers: int) -> dict[str, Any]:
    fields = compression.as_fields()
    return {"compression": fields | {"layer_types": str(compression.map(num_layers))}}


LCKV_LLAMA = Family(
    name="lckv-llama",
    architecture="LCKVLlamaForCausalLM",
    other_architectures=("LlamaForCausalLM",),  # so the published code writes it
    fields=LLAMA_FIELDS
    | {
        "max_position_embeddings": COMMON_FIELDS["max_position_embeddings"],
        "qkv_bias": Field(bool, default=False),
        "qk_norm": Field(bool, default=False),
    },
    fixed={name: fixed for name, fixed in LLAMA_FIXED.items() if name != "auto_map"},
    ignored=IGNORED
    | {
        "auto_map": "the model class, for where this project is not installed",
        "use_sequential": "how the published code is run",
    },
    constants={},
    compression=CompressionFields(
        names=("compression", *PUBLISHED_FIELDS), read=_read, problems=_no_problems, write=_write
    ),
    token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    stock_type="llama",
    old_spelling=False,
)
