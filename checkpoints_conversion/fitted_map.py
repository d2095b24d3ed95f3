"""A sharing map fitted to what a plain model computes on a calibration text (`--init svd`).

The text goes through the plain model, layer by layer. For every layer whose keys and values several layers
will read, or another one, `lckv/sharing/low_rank.py` finds the projections from which the readers' own keys
and values are best restored, and each reader's queries and outputs follow. Then the text goes through both
models side by side, and each reader's output projection is fitted once more: to what attention added in the
plain model, from what the heads return in the new one. So a layer also makes up for what layers below it have
changed, and a cyclic layer for the own position that it no longer sees.

In memory are one layer, the hidden states of the text, what the merged layers compute from it, and the new
attention weights of these layers.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.streamed_layer import KeysValues, StreamedLayer, embed, heads_of
from lckv.config import CompressionConfig
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.low_rank import (
    Reader,
    SharedProjections,
    fit,
    mixed_outputs,
    refitted_outputs,
    turned_queries,
)
from lckv.weights.tensors import TensorInfo, TensorSource

logger = logging.getLogger(__name__)

OUTPUT_RIDGE = 0.1
"""Weight of the penalty on changing an output projection, in mean squares of a channel of its input."""


def check_fits(description: ModelDescription, compression: CompressionConfig) -> None:
    """Raises ConversionError where keys and values cannot be fitted: where more stands between a projection
    and attention than RoPE."""
    if description.model.qk_layernorm:
        raise ConversionError(
            "--init is svd, but the model normalises queries and keys (model.qk_layernorm): shared keys "
            "cannot be turned and scaled to those of a layer. Give --init average or --init copy."
        )
    apart = [
        layer.index for layer in compression.map(description.model.num_layers) if layer.values is not None
    ]
    if apart:
        raise ConversionError(
            f"--init is svd, but in compression.layer_types layer {apart[0]} reads keys of one layer and "
            "values of another, which are fitted together: give --init average or --init copy."
        )
    if compression.policy != CompressionConfig().policy:
        raise ConversionError(
            f"--init is svd, but compression.policy is {compression.policy.name}: the fit mixes channels of "
            "heads, which a policy may read. Convert with --init svd without compression.policy and give the "
            "policy in training, or take --init average or --init copy."
        )


def merged_layers(layer_types: LayerTypes) -> tuple[int, ...]:
    """Layers that share keys and values with others, or read other ones than their own."""
    return tuple(
        layer.index
        for layer in layer_types
        if layer_types.key_readers(layer.source) != (layer.index,) or layer.source != layer.index
    )


@dataclass(frozen=True)
class FittedSource:
    """The tensors of `base`, some of them replaced by fitted ones."""

    base: TensorSource
    fitted: Mapping[str, Tensor]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, as in `base`."""
        return self.base.infos()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`."""
        if name not in self.fitted:
            return self.base.read(name, rows)
        return self.fitted[name][rows or slice(None)]


@torch.no_grad()
def fitted_source(
    plain: TensorSource,
    shared: TensorSource,
    description: ModelDescription,
    compression: CompressionConfig,
    tokens: Tensor,
) -> FittedSource:
    """`shared`, the tensors of the plain model `description` with the map of `compression`, with attention
    weights fitted on `tokens`, int64 [b, T]. Raises ConversionError."""
    check_fits(description, compression)
    fit_of = MapFit(plain, description, compression, tokens)
    infos = shared.infos()
    fitted = {}
    for name, tensor in fit_of.tensors():
        fitted[name] = tensor.to(infos[name].dtype)
        _check_finite(fitted[name], name)
    return FittedSource(shared, fitted)


class MapFit:
    """The fit of one map on one text."""

    def __init__(
        self,
        plain: TensorSource,
        description: ModelDescription,
        compression: CompressionConfig,
        tokens: Tensor,
    ) -> None:
        self.plain, self.model, self.tokens = plain, description.model, tokens
        self.before, self.after = description.compression, compression
        self.old_types = description.compression.map(self.model.num_layers)
        self.layer_types = compression.map(self.model.num_layers)
        self.merged = merged_layers(self.layer_types)
        self.owners = {self.layer_types[layer].source for layer in self.merged}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values, float32, of all that the fit changes."""
        states = self._states_before()
        inputs, readers = self._observe(states)
        shared = {owner: fit(inputs[owner].flatten(0, 1), self._of(readers, owner)) for owner in self.owners}
        yield from self._walk(states, inputs, shared)

    @property
    def first(self) -> int:
        """The lowest layer that changes."""
        return min(self.merged)

    @property
    def last(self) -> int:
        """The highest layer that changes."""
        return max((*self.merged, *self.owners))

    def _read(self, index: int) -> StreamedLayer:
        return StreamedLayer.read(self.plain, self.model, index)

    def _of(self, readers: Mapping[int, Reader], owner: int) -> list[Reader]:
        return [readers[layer] for layer in self.layer_types.key_readers(owner)]

    def _plain(self, layer: StreamedLayer, index: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [1, T, h] after the layer of the plain model, and those between attention and MLP."""
        inputs = layer.inputs(states)
        heads = layer.attend(inputs, layer.keys_values(inputs), self.before.sight(self.old_types[index]))
        middle = states + heads @ layer.output_matrix.T
        return middle + layer.mlp(middle), middle

    def _states_before(self) -> Tensor:
        """Hidden states [b, T, h] before the first layer that changes."""
        states = embed(self.plain, self.tokens)
        for index in range(self.first):
            layer = self._read(index)
            for row in range(len(states)):
                states[row] = self._plain(layer, index, states[row : row + 1])[0][0]
        return states

    def _observe(self, states: Tensor) -> tuple[dict[int, Tensor], dict[int, Reader]]:
        """The inputs [b, T, e] of owners and what readers compute, in the plain model, from the hidden
        `states` [b, T, h] before the first merged layer."""
        states = states.clone()
        inputs, readers = {}, {}
        for index in range(self.first, self.last + 1):
            layer = self._read(index)
            if index in self.owners:
                inputs[index] = layer.inputs(states)
            if index in self.merged:
                readers[index] = _reader(layer, states)
                _check_finite(readers[index].value, f"values of layer {index}")
            for row in range(len(states) if index < self.last else 0):
                states[row] = self._plain(layer, index, states[row : row + 1])[0][0]
        return inputs, readers

    def _walk(
        self, states: Tensor, inputs: Mapping[int, Tensor], shared: Mapping[int, SharedProjections]
    ) -> Iterator[tuple[str, Tensor]]:
        """Both models side by side from the hidden `states` before the first merged layer."""
        old, new = states, states.clone()
        # A cyclic layer reads what iteration converges to; the plain model's input of the owner is the best
        # guess of it before the layers up to the owner are made.
        reads = {owner: _keys_values(shared[owner], inputs[owner]) for owner in self.owners}
        for index in range(self.first, self.last + 1):
            layer = self._read(index)
            middle = torch.empty_like(old)
            for row in range(len(old)):
                after, between = self._plain(layer, index, old[row : row + 1])
                old[row], middle[row] = after[0], between[0]
            if index in self.owners:
                reads[index] = _keys_values(shared[index], layer.inputs(new))
            if index in self.merged:
                layer = self._fitted(layer, index, shared, new, middle, reads)
            yield from self._named(layer, index, shared)
            for row in range(len(new)):
                new[row] = self._advance(layer, index, new[row : row + 1], reads, row)[0]
            logger.info("layer %d: states differ by %.3f of their size", index, _relative(new - old, old))

    def _fitted(
        self,
        layer: StreamedLayer,
        index: int,
        shared: Mapping[int, SharedProjections],
        states: Tensor,
        wanted: Tensor,
        reads: Mapping[int, KeysValues],
    ) -> StreamedLayer:
        """The layer with its new queries and outputs, for hidden `states` of the new model before it; those
        after attention are `wanted`; all [b, T, h]."""
        source = self.layer_types[index].source
        number = self.layer_types.key_readers(source).index(index)
        of_source = shared[source]
        layer = replace(
            layer,
            query=turned_queries(layer.query, of_source.factors[number]),
            output=mixed_outputs(layer.output, of_source.mixes[number]),
        )
        matrix = layer.output_matrix
        width = matrix.shape[1]
        squares = torch.zeros((width, width), dtype=torch.float64)
        products = torch.zeros((width, len(matrix)), dtype=torch.float64)
        for row in range(len(states)):
            heads = self._heads(layer, index, states[row : row + 1], reads, row)[0].double()
            missing = wanted[row] - states[row] - heads @ matrix.T.double()
            # What follows reads normalised states: an error counts as a share of the token's size.
            weighed = heads / wanted[row].double().square().mean(1, keepdim=True).clamp_min(1e-30)
            squares += weighed.T @ heads
            products += weighed.T @ missing
        output = refitted_outputs(matrix, squares, products, OUTPUT_RIDGE)
        return replace(layer, output=output.view_as(layer.output))

    def _heads(
        self,
        layer: StreamedLayer,
        index: int,
        states: Tensor,
        reads: Mapping[int, KeysValues],
        row: int,
    ) -> Tensor:
        layer_type = self.layer_types[index]
        inputs = layer.inputs(states)
        if index in self.merged:
            read = KeysValues(*(part[row : row + 1] for part in reads[layer_type.source]))
        else:
            read = layer.keys_values(inputs)
        return layer.attend(inputs, read, self.after.sight(layer_type))

    def _advance(
        self,
        layer: StreamedLayer,
        index: int,
        states: Tensor,
        reads: Mapping[int, KeysValues],
        row: int,
    ) -> Tensor:
        middle = states + self._heads(layer, index, states, reads, row) @ layer.output_matrix.T
        return middle + layer.mlp(middle)

    def _named(
        self, layer: StreamedLayer, index: int, shared: Mapping[int, SharedProjections]
    ) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors of the layer that the fit changed."""
        prefix = f"decoder.layers.{index}.self_attention."
        if index in self.merged:
            yield f"{prefix}linear_proj.weight", layer.output_matrix.contiguous()
        if index in self.owners:
            keys, values = (weight.float()[:, None] for weight in shared[index][:2])
            rows, name = torch.cat([layer.query, keys, values], dim=1), "linear_qkv"
        elif index in self.merged:
            rows, name = layer.query, "linear_q"
        else:
            return
        rows = rows.flatten(0, 2)  # [.., e]
        if self.model.add_qkv_bias:
            rows, bias = rows[:, :-1], rows[:, -1]
            yield f"{prefix}{name}.bias", bias.contiguous()
        yield f"{prefix}{name}.weight", rows.contiguous()


def _reader(layer: StreamedLayer, states: Tensor) -> Reader:
    """What the layer computes from hidden `states` [b, T, h]."""
    inputs = layer.inputs(states).flatten(0, 1)
    own = layer.keys_values(inputs[None])
    squares = inputs.double().T @ inputs.double() / len(inputs)
    query = layer.query.double()
    energy = torch.einsum("gade,ef,gadf->gd", query, squares, query)
    return Reader(
        own.key[0],
        own.value[0],
        layer.key,
        layer.value,
        energy.unflatten(1, (2, -1)).sum(1),
        torch.einsum("hgad,hgac->gdc", layer.output.double(), layer.output.double()),
    )


def _check_finite(tensor: Tensor, what: str) -> None:
    if not tensor.isfinite().all():
        raise ConversionError(
            f"--init is svd, but on the calibration text {what} became infinite or NaN. Give another text, "
            "or --init average."
        )


def _keys_values(shared: SharedProjections, inputs: Tensor) -> KeysValues:
    """Shared keys before RoPE and values of an owner's `inputs` [b, T, e]."""
    return KeysValues(*(heads_of(inputs, weight.float()) for weight in shared[:2]))


def _relative(difference: Tensor, whole: Tensor) -> float:
    return (difference.norm() / whole.norm().clamp_min(1e-30)).item()
