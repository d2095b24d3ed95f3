"""The families, and which one a model belongs to."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from lckv.errors import ModelError
from lckv.families.base import Family
from lckv.families.decoder import Decoder
from lckv.families.lckv_llama import LCKV_LLAMA
from lckv.families.llama import LLAMA
from lckv.families.mistral import MISTRAL
from lckv.families.old_lckv import CLA_LLAMA, OPT_LLAMA
from lckv.families.qwen2 import QWEN2
from lckv.families.qwen3 import QWEN3
from lckv.weights.tensors import WEIGHT_DTYPES, TensorInfo

PLAIN_FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)
"""Families that stock software runs, the more common first."""
FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (*PLAIN_FAMILIES, LCKV_LLAMA, OPT_LLAMA, CLA_LLAMA)
}
"""All of them, by name."""


def family_of(name: object, where: object = "config.json") -> Family:
    """The family with this name, which is the model_type of its configs.

    Raises ModelError, with the file `where` that gives the name, where there is none.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"{where}: model_type is {name!r}; models of these types can be read: {', '.join(FAMILIES)}."
        )
    return FAMILIES[name]


def describe(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: object = "config.json"
) -> Decoder:
    """The model that the config in the file `where` and the tensors beside it make. Its dtype is that of most
    of the weights.

    Raises ModelError that names every field without meaning here.
    """
    sizes: Counter[torch.dtype] = Counter()
    for info in tensors.values():
        if info.dtype in WEIGHT_DTYPES:
            sizes[info.dtype] += info.nbytes
    dtype = max(sizes, key=sizes.__getitem__) if sizes else None
    return family_of(config.get("model_type"), where).read_config(config, dtype, where)


def export_family(decoder: Decoder) -> Family:
    """The family under which the model is written for Hugging Face: its own or another one that stock
    software runs if one of them can express it, else lckv-llama."""
    own = [family for family in PLAIN_FAMILIES if family.name == decoder.family]
    for family in (*own, *PLAIN_FAMILIES):
        if not family.problems(decoder):
            return family
    return LCKV_LLAMA
