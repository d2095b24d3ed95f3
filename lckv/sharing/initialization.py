"""Key and value weights of a shared map from those of a plain model: copy or average. What fits them to a
text is in `low_rank.py`.

The average is the rule of MLKV (Zuhri et al. 2024): a layer that computes keys and values for others starts
from the mean of the weights of all layers that will read it. A layer that reads a mixture begins as a reader
of its first layer, so it counts there; of one that reads keys and values of two layers each kind counts where
it is read.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lckv.sharing.layer_types import LayerTypes

Initialization = Literal["copy", "average", "svd"]
"""svd: fitted to a text; these weights are no function of the plain model's alone."""
WeightRule = Literal["copy", "average"]
Kind = Literal["key", "value"]


def source_layers(layer_types: LayerTypes, layer: int, how: WeightRule, kind: Kind) -> tuple[int, ...]:
    """Layers of the plain model whose key or value weights make those of `layer`."""
    if how == "copy":
        return (layer,)
    return layer_types.key_readers(layer) if kind == "key" else layer_types.value_readers(layer)


def initial_kv_weight(
    layer_types: LayerTypes, layer: int, plain_weight: Callable[[int], Tensor], how: WeightRule, kind: Kind
) -> Tensor:
    """The weight (or bias) of `kind` of `layer`, which computes keys and values in `layer_types`.

    `plain_weight(i)` gives that of layer i of the plain model, of any shape; the result has the same shape
    and dtype. The mean is taken in float32. Raises ValueError for a layer that computes no keys and values.
    """
    if layer not in layer_types.kv_layers:
        raise ValueError(
            f"layer {layer} computes no keys and values in {layer_types}: it has no such weights."
        )
    sources = source_layers(layer_types, layer, how, kind)
    if len(sources) == 1:
        return plain_weight(sources[0])
    total: Tensor | None = None
    for source in sources:
        weight = plain_weight(source).to(torch.float32)
        total = weight if total is None else total + weight
    assert total is not None
    return (total / len(sources)).to(plain_weight(sources[0]).dtype)
