"""A learned first guess that a conversion adds to a model, or leaves out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from lckv.config import CompressionConfig
from lckv.weights.tensors import TensorInfo, TensorSource

_SUFFIX = "self_attention.linear_first_guess.weight"


def with_first_guess(
    source: TensorSource, description: ModelDescription, compression: CompressionConfig
) -> TensorSource:
    """The canonical tensors `source` of the model `description`, with the first guess that `compression` has:
    of zeros where it is new, with which passes begin as without one; left out where it is given up."""
    if compression.first_guess == description.compression.first_guess:
        return source
    model = description.model
    layers = compression.map(model.num_layers).cyclic_sources if compression.first_guess else ()
    return FirstGuessSource(source, layers, 2 * model.query_groups * model.head_dim)


@dataclass(frozen=True)
class FirstGuessSource:
    """The tensors of `whole` with first guesses of zeros for `layers` in the place of any others."""

    whole: TensorSource
    layers: tuple[int, ...]

    rows: int
    """Of the weight of a guess."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor."""
        return self._infos

    @cached_property
    def _zeros(self) -> dict[str, TensorInfo]:
        infos = self.whole.infos()
        zeros = {}
        for layer in self.layers:
            attention = infos[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
            zeros[f"decoder.layers.{layer}.{_SUFFIX}"] = TensorInfo(
                (self.rows, *attention.shape[1:]), attention.dtype
            )
        return zeros

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        kept = {name: info for name, info in self.whole.infos().items() if not name.endswith(_SUFFIX)}
        return kept | self._zeros

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`."""
        if name not in self._zeros:
            return self.whole.read(name, rows)
        info = self._zeros[name]
        return torch.zeros(info.shape, dtype=info.dtype)[rows or slice(None)]
