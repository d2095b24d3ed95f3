"""What travels between two pipeline stages: hidden states, and the keys and values that later stages still read.

Megatron's schedules differentiate through the first tensor of a stage's output only, so everything travels in one flat tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lckv.policies.base import KeyValue
from lckv.sharing.layer_types import LayerTypes

Shape = tuple[int, ...]


def crossing_sources(layer_types: LayerTypes, boundary: int) -> tuple[int, ...]:
    """Layers below `boundary` whose keys and values a layer at or above it reads, ascending."""
    layers = layer_types.layers[boundary:]
    return tuple(sorted({layer.source for layer in layers if layer.source < boundary}))


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
    """Channels of one head."""

    def shape(self, seq_length: int, micro_batch_size: int) -> Shape:
        """Shape of the tensor for a micro-batch."""
        hidden = self._hidden_shape(seq_length, micro_batch_size)
        if not self.sources:
            return hidden
        heads = self._heads_shape(seq_length, micro_batch_size)
        return (torch.Size(hidden).numel() + 2 * len(self.sources) * torch.Size(heads).numel(),)

    def pack(self, hidden_states: Tensor, key_values: dict[int, KeyValue]) -> Tensor:
        """Hidden states [s / shards, b, hidden] and the crossing keys and values [s, b, heads, D] as one tensor."""
        if not self.sources:
            return hidden_states
        parts = [hidden_states]
        for source in self.sources:
            if source not in key_values:
                raise ValueError(
                    f"a later pipeline stage reads the keys and values of layer {source}, which this stage does not have; "
                    f"it has those of {sorted(key_values) or 'no layer'}."
                )
            parts += key_values[source]
        return torch.cat([part.reshape(-1) for part in parts])

    def unpack(self, tensor: Tensor, seq_length: int, micro_batch_size: int) -> tuple[Tensor, dict[int, KeyValue]]:
        """The inverse of `pack`; ValueError where the size is not that of `shape`."""
        expected = self.shape(seq_length, micro_batch_size)
        if tensor.numel() != torch.Size(expected).numel():
            raise ValueError(
                f"the previous pipeline stage sent {tensor.numel()} numbers, expected {torch.Size(expected).numel()} for "
                f"{micro_batch_size} x {seq_length} tokens and the keys and values of layers {list(self.sources)}."
            )
        hidden = self._hidden_shape(seq_length, micro_batch_size)
        if not self.sources:
            return tensor.view(hidden), {}
        heads = self._heads_shape(seq_length, micro_batch_size)
        sizes = [torch.Size(hidden).numel(), *[torch.Size(heads).numel()] * (2 * len(self.sources))]
        hidden_states, *parts = tensor.split(sizes)
        pairs = zip(self.sources, parts[::2], parts[1::2], strict=True)
        return hidden_states.view(hidden), {
            source: KeyValue(key.view(heads), value.view(heads)) for source, key, value in pairs
        }

    def _hidden_shape(self, seq_length: int, micro_batch_size: int) -> Shape:
        return (seq_length // self.sequence_shards, micro_batch_size, self.hidden_size)

    def _heads_shape(self, seq_length: int, micro_batch_size: int) -> Shape:
        return (seq_length, micro_batch_size, self.kv_heads, self.head_dim)
