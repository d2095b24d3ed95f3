"""A plain model's weights as those of a model whose layers share keys and values: by copy or by average,
nothing read in advance; or fitted to a text (`fitted_map.py`).

The rule is lckv/sharing/initialization.py's. A layer that only reads keeps its queries; what computed its own
keys and values goes into the layer that it reads (average), or is dropped (copy).
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.first_guess import with_first_guess
from checkpoints_conversion.fitted_map import fitted_source
from checkpoints_conversion.mix_weights import with_mix_weights
from lckv.config import CompressionConfig
from lckv.sharing.doubts import doubts
from lckv.sharing.initialization import Initialization, WeightRule, initial_kv_weight
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.picture import draw
from lckv.weights.tensors import TensorInfo, TensorSource, row_chunks
from megatron_ext.config import ModelConfig
from megatron_ext.validation.layout import compression_problems

logger = logging.getLogger(__name__)

_ATTENTION = re.compile(
    r"decoder\.layers\.(\d+)\.self_attention\.(linear_qkv|linear_q|k_layernorm)\.(weight|bias)"
)


def initialize(
    source: TensorSource,
    description: ModelDescription,
    compression: CompressionConfig,
    how: Initialization,
    tokens: Tensor | None = None,
) -> tuple[TensorSource, ModelDescription, Initialization | None]:
    """The weights `source` of the model `description` for the same model with `compression`, its description,
    and how its keys and values were made: None where all weights are the source's.

    A map can be given to a model whose layers all read their own keys and values, and a KV policy, where it
    has no obstacle, to one that keeps every token. A model that has a map or a policy already keeps it; how
    often its plan iterates, and from which first guess, may change. Layers that mix keys and values of others
    into their own begin as if they did not. `tokens`, int64 [b, T], are those that "svd" fits on. Raises
    ConversionError.
    """
    layers = description.model.num_layers
    if problems := [*compression_problems(compression, layers)]:
        raise ConversionError("\n".join(problems))
    _check_policy(description, compression)
    old, new = description.compression.map(layers), compression.map(layers)
    changed = replace(description, compression=compression)
    source = with_first_guess(source, description, compression)
    if not old.is_plain:
        _check_same_map(description.compression, compression, old, new)
        _check_fits_nothing(tokens, new)
        return source, changed, None
    source = with_mix_weights(source, description, compression)
    if new.kv_layers == old.kv_layers and all(layer.source == layer.index for layer in new):
        _check_fits_nothing(tokens, new)
        return source, changed, None
    if sentences := [*doubts(new)]:
        logger.warning("%s\n%s", draw(new, window=compression.sliding_window), "\n".join(sentences))
    if how != "svd":
        return SharedMapSource(source, description.model, new, how), changed, how
    if tokens is None:
        raise ConversionError(
            "--init is svd, which fits keys and values to what the model computes on a text, but there is no "
            "text: give --calibration-text, or take --init average or --init copy."
        )
    copied = SharedMapSource(source, description.model, new, "copy")
    return fitted_source(source, copied, description, compression, tokens), changed, how


def _check_fits_nothing(tokens: Tensor | None, layer_types: LayerTypes) -> None:
    if tokens is not None:
        raise ConversionError(
            f"--calibration-text is given, but compression.layer_types {layer_types} makes no new sharing of "
            "keys and values, so that nothing is fitted: leave it and --init out, or give a sharing map."
        )


def _check_same_map(
    before: CompressionConfig, after: CompressionConfig, old: LayerTypes, new: LayerTypes
) -> None:
    kept = ("sliding_window", "force_nodiag", "mix_scaling_factor")
    if old == new and all(getattr(before, name) == getattr(after, name) for name in kept):
        return
    if old == new and before.mix_scaling_factor != after.mix_scaling_factor:
        raise ConversionError(
            f"compression.mix_scaling_factor is {after.mix_scaling_factor}, but the model's weights that mix "
            f"keys and values belong to {before.mix_scaling_factor}: leave it out."
        )
    raise ConversionError(
        f"compression.layer_types {new} (sliding_window {after.sliding_window}, force_nodiag "
        f"{after.force_nodiag}) cannot be made from this model: it shares keys and values already ({old}, "
        f"sliding_window {before.sliding_window}, force_nodiag {before.force_nodiag}), and layers that only "
        "read have no weights for their own. Leave these settings out to convert the model as it is, or "
        "start from a plain model."
    )


def _check_policy(description: ModelDescription, compression: CompressionConfig) -> None:
    before, after = description.compression.policy, compression.policy
    if before == after:
        return
    if before != CompressionConfig().policy:
        raise ConversionError(
            f"compression.policy is {after} but the model was trained with {before}; a conversion keeps the "
            "policy. Leave compression.policy out; a new stage starts in training, with checkpoint.finetune."
        )
    obstacle = after.obstacle_to_converting(before)
    if obstacle is not None:
        raise ConversionError(f"compression.policy is {after.name}: {obstacle}.")


@dataclass(frozen=True)
class SharedMapSource:
    """The tensors of a model with the map `layer_types`, made from those of a plain model of the sizes
    `model` as they are read."""

    plain: TensorSource
    model: ModelConfig
    layer_types: LayerTypes
    how: WeightRule

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model that shares."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, info in self.plain.infos().items():
            match = _ATTENTION.fullmatch(name)
            if match is None or int(match[1]) in self.layer_types.kv_layers:
                infos[name] = info
            elif match[2] == "linear_qkv":
                rows = self.model.num_attention_heads * self.model.head_dim
                infos[name.replace("linear_qkv", "linear_q")] = replace(info, shape=(rows, *info.shape[1:]))
        return infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`. Averages are taken in float32."""
        match = _ATTENTION.fullmatch(name)
        if match is None:
            return self.plain.read(name, rows)
        layer, part = int(match[1]), match[2]

        def of_layer(index: int, rows: slice | None) -> Tensor:
            return self.plain.read(_renumber(name, index), rows)

        if part == "k_layernorm":
            return initial_kv_weight(self.layer_types, layer, lambda index: of_layer(index, rows), self.how)
        if part == "linear_q":
            fused = name.replace("linear_q", "linear_qkv")
            return self._assemble(name, rows, self._query_rows(), lambda piece: self.plain.read(fused, piece))
        if self.how == "copy":
            return self.plain.read(name, rows)

        def read_piece(piece: slice) -> Tensor:
            if self._is_query(piece.start):
                return of_layer(layer, piece)
            return initial_kv_weight(self.layer_types, layer, lambda index: of_layer(index, piece), self.how)

        return self._assemble(name, rows, self._query_and_kv_rows(), read_piece)

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

    def _is_query(self, row: int) -> bool:
        return row % self._rows_of_group < self._rows_of_queries

    def _query_rows(self) -> Iterator[slice]:
        for group in range(self.model.query_groups):
            first = group * self._rows_of_group
            yield slice(first, first + self._rows_of_queries)

    def _query_and_kv_rows(self) -> Iterator[slice]:
        for queries in self._query_rows():
            yield queries
            yield slice(queries.stop, queries.start + self._rows_of_group)


def _renumber(name: str, layer: int) -> str:
    """The same tensor of another layer."""
    return re.sub(r"(?<=layers\.)\d+", str(layer), name)
