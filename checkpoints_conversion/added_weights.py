"""Small weights that a conversion adds to layers of a model: those that mix keys and values of two layers,
and parameters of a KV policy's own. They are as training begins with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from lckv.config import CompressionConfig
from lckv.families.weights import MIX_WEIGHTS
from lckv.sharing.mixing import initial_weight
from lckv.weights.tensors import TensorInfo, TensorSource


def with_mix_weights(
    source: TensorSource, description: ModelDescription, compression: CompressionConfig
) -> TensorSource:
    """The canonical tensors `source` of the model `description`, with weights for the layers that mix in the
    map of `compression`, where the model has none: with these nothing is mixed in yet."""
    layers = description.model.num_layers
    mixing = tuple(layer.index for layer in compression.family(layers).stored if layer.mixes is not None)
    if not mixing or description.compression.map(layers).any_mixed:
        return source
    weight = initial_weight(compression.mix_scaling_factor)
    return AddedWeightsSource(source, mixing, dict.fromkeys(MIX_WEIGHTS, weight))


def with_policy_weights(
    source: TensorSource, description: ModelDescription, compression: CompressionConfig
) -> TensorSource:
    """The canonical tensors `source` of the model `description`, with those that the KV policy of
    `compression` has of its own, where the model has none, in every layer that computes keys and values."""
    projection, model = compression.policy.traits.projection, description.model
    if projection is None or description.compression.policy.traits.projection is not None:
        return source
    shapes = projection.parameters(model.hidden_size, model.query_groups, bias=model.add_qkv_bias)
    initial = {
        name: torch.full(shape, float(name.startswith(projection.norm_name)))
        for name, shape in shapes.items()
    }
    layers = description.compression.family(model.num_layers).stored.kv_layers
    return AddedWeightsSource(source, layers, initial)


@dataclass(frozen=True)
class AddedWeightsSource:
    """The tensors of `whole`, and the same new ones in the attention of each of `layers`."""

    whole: TensorSource
    layers: tuple[int, ...]

    initial: Mapping[str, Tensor]
    """The new ones by name within attention; they get the dtype of the layer's projection."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor."""
        added = {name: TensorInfo(tuple(weight.shape), weight.dtype) for name, weight in self._added.items()}
        return {**self.whole.infos(), **added}

    @cached_property
    def _added(self) -> dict[str, Tensor]:
        infos = self.whole.infos()
        added: dict[str, Tensor] = {}
        for layer in self.layers:
            attention = f"decoder.layers.{layer}.self_attention"
            dtype = infos[f"{attention}.linear_qkv.weight"].dtype
            added |= {f"{attention}.{name}": weight.to(dtype) for name, weight in self.initial.items()}
        return added

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`."""
        if name not in self._added:
            return self.whole.read(name, rows)
        return self._added[name][rows or slice(None)].clone()
