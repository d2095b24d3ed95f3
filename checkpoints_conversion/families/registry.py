"""The families, and which one a model belongs to."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.families.base import Family
from checkpoints_conversion.families.lckv_llama import LCKV_LLAMA
from checkpoints_conversion.families.llama import LLAMA
from checkpoints_conversion.families.mistral import MISTRAL
from checkpoints_conversion.families.qwen2 import QWEN2
from checkpoints_conversion.families.qwen3 import QWEN3
from checkpoints_conversion.tensors import WEIGHT_DTYPES, ConversionError, TensorInfo

PLAIN_FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)
"""Families that stock software runs, the more common first."""
FAMILIES: Mapping[str, Family] = {family.name: family for family in (*PLAIN_FAMILIES, LCKV_LLAMA)}
"""All of them, by name."""


def family_of(name: object) -> Family:
    """The family with this name, which is the model_type of its configs; raises ConversionError where there
    is none."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConversionError(
            f"config.json: model_type is {name!r}; models of {', '.join(FAMILIES)} can be converted."
        )
    return FAMILIES[name]


def describe(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelDescription:
    """The model that a config.json and the tensors beside it make; its dtype is that of most of the weights.

    Raises ConversionError naming every field that cannot be converted.
    """
    sizes: Counter[Any] = Counter()
    for info in tensors.values():
        if info.dtype in WEIGHT_DTYPES:
            sizes[info.dtype] += info.nbytes
    dtype = max(sizes, key=sizes.__getitem__) if sizes else None
    return family_of(config.get("model_type")).read_config(config, dtype)


def export_family(description: ModelDescription) -> Family:
    """The family under which the model is written for Hugging Face: its own or another one that stock
    software runs if one of them can express it, else lckv-llama."""
    own = [family for family in PLAIN_FAMILIES if family.name == description.family]
    for family in (*own, *PLAIN_FAMILIES):
        if not family.problems(description):
            return family
    return LCKV_LLAMA
