"""The tensors of a model whose layers share keys and values, made from those of a model in which more layers
compute their own: of a plain one, or of one that was trained with a family of maps."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lckv.policies.config import Projection
from lckv.sharing.initialization import Kind, WeightRule, initial_kv_weight
from lckv.sharing.layer_types import LayerTypes
from lckv.weights.tensors import TensorInfo, TensorSource, row_chunks
from megatron_ext.config import ModelConfig

_ATTENTION = re.compile(r"decoder\.layers\.(\d+)\.self_attention\.(\w+)\.(weight|bias)")
_KEY_NORM = "k_layernorm"


@dataclass(frozen=True)
class SharedMapSource:
    """The tensors of a model with the map `layer_types`, made as they are read from those of a model `whole`
    of the sizes `model`, in which every layer that computes keys and values in the map does so too."""

    whole: TensorSource
    model: ModelConfig
    layer_types: LayerTypes

    how: WeightRule
    """To average, all layers of `whole` must compute their own."""

    projection: Projection | None = None
    """Parameters of the KV policy's own, which are those of layers that compute keys and values, too."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model that shares."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, info in self.whole.infos().items():
            match = self._match(name)
            if match is None or match[2] == "linear_q" or int(match[1]) in self.layer_types.kv_layers:
                infos[name] = info
            elif match[2] == "linear_qkv":
                rows = self.model.num_attention_heads * self.model.head_dim
                infos[name.replace("linear_qkv", "linear_q")] = replace(info, shape=(rows, *info.shape[1:]))
        return infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`. Averages are taken in float32."""
        match = self._match(name)
        if match is None or (match[2] == "linear_q" and name in self.whole.infos()):
            return self.whole.read(name, rows)
        layer, part = int(match[1]), match[2]

        def of_layer(index: int, rows: slice | None) -> Tensor:
            return self.whole.read(_renumber(name, index), rows)

        if part in self._beside_keys:
            return self._initial(layer, lambda index: of_layer(index, rows), "key")
        if part == "linear_q":
            fused = name.replace("linear_q", "linear_qkv")
            return self._assemble(name, rows, self._query_rows(), lambda piece: self.whole.read(fused, piece))
        if self.how == "copy":
            return self.whole.read(name, rows)

        def read_piece(piece: slice) -> Tensor:
            kind = self._kind(piece.start)
            if kind == "query":
                return of_layer(layer, piece)
            return self._initial(layer, lambda index: of_layer(index, piece), kind)

        return self._assemble(name, rows, self._query_and_kv_rows(), read_piece)

    def _initial(self, layer: int, plain_weight: Callable[[int], Tensor], kind: Kind) -> Tensor:
        return initial_kv_weight(self.layer_types, layer, plain_weight, self.how, kind)

    @cached_property
    def _beside_keys(self) -> tuple[str, ...]:
        """Modules that a layer has for its keys and values, but for their projection."""
        if self.projection is None:
            return (_KEY_NORM,)
        return _KEY_NORM, self.projection.norm_name, self.projection.name

    def _match(self, name: str) -> re.Match[str] | None:
        """Layer, module and kind of a tensor whose place or rows hang on the map."""
        match = _ATTENTION.fullmatch(name)
        return match if match and match[2] in ("linear_qkv", "linear_q", *self._beside_keys) else None

    def _assemble(
        self, name: str, rows: slice | None, runs: Iterator[slice], read_piece: Callable[[slice], Tensor]
    ) -> Tensor:
        """Rows `rows` of the tensor `name`, which is made of the runs `runs` of the plain model's rows, one
        run below the other."""
        info = self._infos[name]
        start, stop, _ = (rows or slice(None)).indices(info.shape[0])
        result = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        first = 0  # of the run, among the tensor's own rows
        for run in runs:
            length = run.stop - run.start
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                wanted = replace(info, shape=(high - low, *info.shape[1:]))
                for chunk in row_chunks(wanted):
                    shift = run.start + low - first
                    target = slice(low - start + chunk.start, low - start + chunk.stop)
                    result[target] = read_piece(slice(shift + chunk.start, shift + chunk.stop))
            first += length
        return result

    @property
    def _rows_of_queries(self) -> int:
        """Per key/value head."""
        return self.model.num_attention_heads // self.model.query_groups * self.model.head_dim

    @property
    def _rows_of_group(self) -> int:
        return self._rows_of_queries + 2 * self.model.head_dim

    def _kind(self, row: int) -> Literal["query", "key", "value"]:
        place = row % self._rows_of_group - self._rows_of_queries
        return "query" if place < 0 else "key" if place < self.model.head_dim else "value"

    def _query_rows(self) -> Iterator[slice]:
        for group in range(self.model.query_groups):
            first = group * self._rows_of_group
            yield slice(first, first + self._rows_of_queries)

    def _query_and_kv_rows(self) -> Iterator[slice]:
        for queries in self._query_rows():
            yield queries
            values = queries.stop + self.model.head_dim
            yield slice(queries.stop, values)
            yield slice(values, queries.start + self._rows_of_group)


def _renumber(name: str, layer: int) -> str:
    """The same tensor of another layer."""
    return re.sub(r"(?<=layers\.)\d+", str(layer), name)
