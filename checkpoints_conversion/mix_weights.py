"""Weights of layers that mix keys and values of two layers, which a conversion adds to a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

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
    return MixWeightsSource(source, mixing, compression.mix_scaling_factor)


@dataclass(frozen=True)
class MixWeightsSource:
    """The tensors of `whole`, and weights that mix for `layers`."""

    whole: TensorSource
    layers: tuple[int, ...]

    scaling_factor: float
    """s: the weights begin as [0, 1 / s]."""

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
            added |= {f"{attention}.{name}": TensorInfo((2,), dtype) for name in MIX_WEIGHTS}
        return added

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`."""
        if name not in self._added:
            return self.whole.read(name, rows)
        return initial_weight(self.scaling_factor).to(self._added[name].dtype)[rows or slice(None)]
