"""What travels between two pipeline stages: hidden states, and the keys and values that later stages still
read.

Megatron's schedules differentiate through the first tensor of a stage's output only, so everything travels in
one flat tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lckv.policies.base import KeyValue

Shape = tuple[int, ...]
_PIECES = 3
"""Numbers of the payload's dtype that carry one float32 number: three bfloat16 have more digits than it."""


@dataclass(frozen=True)
class PipelinePayload:
    """The tensor that crosses one stage boundary, on one tensor-parallel rank."""

    sources: tuple[int, ...]
    """Layers whose keys and values cross."""

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
    """Columns of the running sums of the KV policy's statistics [b, columns] that cross too; 0: none do."""

    def shape(self, seq_length: int, micro_batch_size: int) -> Shape:
        """Shape of the tensor for a micro-batch."""
        hidden = self._hidden_shape(seq_length, micro_batch_size)
        if self._only_hidden:
            return hidden
        return (sum(self._sizes(seq_length, micro_batch_size)),)

    @property
    def _only_hidden(self) -> bool:
        return not self.sources and not self.sum_columns

    def _sizes(self, seq_length: int, micro_batch_size: int) -> list[int]:
        hidden = self._hidden_shape(seq_length, micro_batch_size)
        pair = [math.prod(shape) for shape in self.key_value_shapes(seq_length, micro_batch_size)]
        return [math.prod(hidden), *pair * len(self.sources), _PIECES * micro_batch_size * self.sum_columns]

    def pack(
        self, hidden_states: Tensor, key_values: Mapping[int, KeyValue], sums: Tensor | None = None
    ) -> Tensor:
        """Hidden states [s / shards, b, hidden], the crossing keys and values (`key_value_shapes`) and the
        sums of statistics float32 [b, columns] as one tensor."""
        if self._only_hidden:
            return hidden_states
        parts = [hidden_states]
        for source in self.sources:
            if source not in key_values:
                raise ValueError(
                    f"a later pipeline stage reads the keys and values of layer {source}, which this stage "
                    f"does not have; it has those of {sorted(key_values) or 'no layer'}."
                )
            parts += key_values[source]
        if sums is not None:
            parts += _split_float(sums, hidden_states.dtype)
        return torch.cat([part.reshape(-1) for part in parts])

    def unpack(
        self, tensor: Tensor, seq_length: int, micro_batch_size: int
    ) -> tuple[Tensor, dict[int, KeyValue], Tensor | None]:
        """The inverse of `pack`; ValueError where the size is not that of `shape`."""
        expected = self.shape(seq_length, micro_batch_size)
        if tensor.numel() != math.prod(expected):
            raise ValueError(
                f"the previous pipeline stage sent {tensor.numel()} numbers, expected {math.prod(expected)} "
                f"for {micro_batch_size} x {seq_length} tokens and the keys and values of layers "
                f"{list(self.sources)}."
            )
        hidden = self._hidden_shape(seq_length, micro_batch_size)
        if self._only_hidden:
            return tensor.view(hidden), {}, None
        keys, values = self.key_value_shapes(seq_length, micro_batch_size)
        hidden_states, *parts, sums = tensor.split(self._sizes(seq_length, micro_batch_size))
        pairs = zip(self.sources, parts[::2], parts[1::2], strict=True)
        key_values = {source: KeyValue(key.view(keys), value.view(values)) for source, key, value in pairs}
        if not self.sum_columns:
            return hidden_states.view(hidden), key_values, None
        pieces = sums.view(_PIECES, micro_batch_size, self.sum_columns)
        return hidden_states.view(hidden), key_values, pieces.float().sum(0)

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
