"""What travels between two pipeline stages: hidden states, the keys and values that later stages still read,
and those that go to the next pass over a group.

Megatron's schedules differentiate through the first tensor of a stage's output only, so everything travels in
one flat tensor.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.policies.base import KeyValue
from lckv.sharing.journey import Cargo

Shape = tuple[int, ...]
KeyValues = Mapping[int, KeyValue]
"""Keys and values by the layer that computed them."""

_PIECES = 3
"""Numbers of the payload's dtype that carry one float32 number: three bfloat16 have more digits than it."""


class Freight(NamedTuple):
    """The content of a payload; see `Cargo`."""

    hidden_states: Tensor | None
    """[s / shards, b, hidden]"""

    available: KeyValues
    handed: KeyValues
    previous: KeyValues

    sums: Tensor | None
    """float32 [b, columns]: running sums of the KV policy's statistics."""

    lent: KeyValues
    """What layers lend to those that mix it into their own: of the rank's part of rows, without extra
    channels."""

    def with_pairs(self, change: Callable[[KeyValue], KeyValue]) -> "Freight":
        """With all keys and values changed that layers attend to."""
        kinds = self.available, self.handed, self.previous
        available, handed, previous = (
            {layer: change(pair) for layer, pair in pairs.items()} for pairs in kinds
        )
        return self._replace(available=available, handed=handed, previous=previous)


@dataclass(frozen=True)
class PipelinePayload:
    """The tensor that goes from a stage to another, on one tensor-parallel rank."""

    cargo: Cargo

    hidden_size: int
    """Width of the residual stream."""

    sequence_shards: int
    """Over how many ranks the hidden states' sequence is split (sequence parallelism), else 1."""

    kv_heads: int
    """KV heads of this rank."""

    head_dim: int
    """Channels of one head of values."""

    extra_channels: int = 0
    """Channels that keys have beyond those of values (`KeyBias`)."""

    sum_columns: int = 0
    """Columns of the sums of statistics that travel too; 0: none do."""

    def shape(self, seq_length: int, micro_batch_size: int) -> Shape:
        """Shape of the tensor for a micro-batch."""
        if self._only_hidden:
            return self._hidden_shape(seq_length, micro_batch_size)
        return (sum(self._sizes(seq_length, micro_batch_size)),)

    @property
    def _places(self) -> list[int]:
        """The layers whose keys and values travel; the same layer may be there twice, of two passes."""
        return [*self.cargo.available, *self.cargo.handed, *self.cargo.previous]

    @property
    def _only_hidden(self) -> bool:
        return self.cargo.hidden and not (self._places or self.cargo.lent or self.sum_columns)

    def _sizes(self, seq_length: int, micro_batch_size: int) -> list[int]:
        hidden = math.prod(self._hidden_shape(seq_length, micro_batch_size)) if self.cargo.hidden else 0
        pair = [math.prod(shape) for shape in self.key_value_shapes(seq_length, micro_batch_size)]
        lent = pair[1:] * 2 * len(self.cargo.lent)
        return [hidden, *pair * len(self._places), *lent, _PIECES * micro_batch_size * self.sum_columns]

    def pack(self, freight: Freight, part: Callable[[KeyValue], KeyValue] | None = None) -> Tensor:
        """The freight as one tensor; of keys and values `part` travels, where it is given. ValueError where
        keys and values are not there that travel."""
        if self._only_hidden:
            assert freight.hidden_states is not None
            return freight.hidden_states
        pairs = [pair for pairs in self._pairs(freight) for pair in pairs]
        parts = [tensor for pair in pairs for tensor in (pair if part is None else part(pair))]
        lent = self._chosen(self.cargo.lent, freight.lent, "mixes in")
        parts += [tensor for pair in lent for tensor in pair]
        if self.cargo.hidden:
            assert freight.hidden_states is not None
            parts.insert(0, freight.hidden_states)
        if self.sum_columns:
            assert freight.sums is not None
            parts += _split_float(freight.sums, parts[0].dtype)
        return torch.cat([part.reshape(-1) for part in parts])

    def _pairs(self, freight: Freight) -> Iterator[list[KeyValue]]:
        cargo = self.cargo
        for layers, key_values, what in (
            (cargo.available, freight.available, "reads"),
            (cargo.handed, freight.handed, "gets for the next pass"),
            (cargo.previous, freight.previous, "reads, of the pass before,"),
        ):
            yield self._chosen(layers, key_values, what)

    @staticmethod
    def _chosen(layers: tuple[int, ...], key_values: KeyValues, what: str) -> list[KeyValue]:
        for layer in layers:
            if layer not in key_values:
                raise ValueError(
                    f"a later pipeline stage {what} the keys and values of layer {layer}, which this "
                    f"stage does not have; it has those of {sorted(key_values) or 'no layer'}."
                )
        return [key_values[layer] for layer in layers]

    def unpack(self, tensor: Tensor, seq_length: int, micro_batch_size: int) -> Freight:
        """The inverse of `pack`; ValueError where the size is not that of `shape`."""
        expected = self.shape(seq_length, micro_batch_size)
        if tensor.numel() != math.prod(expected):
            raise ValueError(
                f"the previous pipeline stage sent {tensor.numel()} numbers, expected {math.prod(expected)} "
                f"for {micro_batch_size} x {seq_length} tokens and the keys and values of layers "
                f"{self._places}."
            )
        hidden = self._hidden_shape(seq_length, micro_batch_size)
        if self._only_hidden:
            return Freight(tensor.view(hidden), {}, {}, {}, None, {})
        keys, values = self.key_value_shapes(seq_length, micro_batch_size)
        hidden_states, *parts, sums = tensor.split(self._sizes(seq_length, micro_batch_size))
        cargo, places = self.cargo, 2 * len(self._places)
        pairs, lent = (zip(some[::2], some[1::2], strict=True) for some in (parts[:places], parts[places:]))
        key_values = (KeyValue(key.view(keys), value.view(values)) for key, value in pairs)
        # zip takes from `layers` first, so that nothing is lost between the three
        available, handed, previous = (
            dict(zip(layers, key_values, strict=False))
            for layers in (cargo.available, cargo.handed, cargo.previous)
        )
        return Freight(
            hidden_states.view(hidden) if cargo.hidden else None,
            available,
            handed,
            previous,
            self._joined(sums, micro_batch_size),
            {
                layer: KeyValue(*(tensor.view(values) for tensor in pair))
                for layer, pair in zip(cargo.lent, lent, strict=True)
            },
        )

    def _joined(self, sums: Tensor, micro_batch_size: int) -> Tensor | None:
        if not self.sum_columns:
            return None
        return sums.view(_PIECES, micro_batch_size, self.sum_columns).float().sum(0)

    def _hidden_shape(self, seq_length: int, micro_batch_size: int) -> Shape:
        return (seq_length // self.sequence_shards, micro_batch_size, self.hidden_size)

    def key_value_shapes(self, seq_length: int, micro_batch_size: int) -> tuple[Shape, Shape]:
        """Shapes of one layer's keys and values: [s, b, heads, D + extra channels] and [s, b, heads, D]."""
        heads = (seq_length, micro_batch_size, self.kv_heads)
        return (*heads, self.head_dim + self.extra_channels), (*heads, self.head_dim)


def _split_float(numbers: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """`numbers` float32 as a sum of _PIECES tensors of `dtype`; gradients pass through the first."""
    pieces, rest = [], numbers
    for _ in range(_PIECES):
        pieces.append(rest.to(dtype))
        rest = (rest - pieces[-1].float()).detach()
    return pieces
