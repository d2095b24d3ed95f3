"""Parameters of a KV policy's own, which a conversion adds to a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from lckv.config import CompressionConfig
from lckv.policies.config import Projection
from lckv.weights.tensors import TensorInfo, TensorSource


def with_policy_weights(
    source: TensorSource, description: ModelDescription, compression: CompressionConfig
) -> TensorSource:
    """The canonical tensors `source` of the model `description`, with those that the KV policy of
    `compression` has of its own, where the model has none: as they begin, in every layer that computes keys
    and values."""
    projection, model = compression.policy.traits.projection, description.model
    if projection is None or description.compression.policy.traits.projection is not None:
        return source
    shapes = projection.parameters(model.hidden_size, model.query_groups, bias=model.add_qkv_bias)
    layers = description.compression.family(model.num_layers).stored.kv_layers
    return PolicyWeightsSource(source, layers, projection, shapes)


@dataclass(frozen=True)
class PolicyWeightsSource:
    """The tensors of `whole`, and those of a policy's own in `layers`."""

    whole: TensorSource
    layers: tuple[int, ...]
    projection: Projection

    shapes: Mapping[str, tuple[int, ...]]
    """By name within attention."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor."""
        return {**self.whole.infos(), **self._added}

    @cached_property
    def _added(self) -> dict[str, TensorInfo]:
        infos = self.whole.infos()
        added: dict[str, TensorInfo] = {}
        for layer in self.layers:
            attention = f"decoder.layers.{layer}.self_attention"
            dtype = infos[f"{attention}.linear_qkv.weight"].dtype
            added |= {f"{attention}.{name}": TensorInfo(shape, dtype) for name, shape in self.shapes.items()}
        return added

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`."""
        if name not in self._added:
            return self.whole.read(name, rows)
        info = self._added[name]
        is_norm = f".{self.projection.norm_name}." in name
        return torch.full(info.shape, float(is_norm), dtype=info.dtype)[rows or slice(None)]
