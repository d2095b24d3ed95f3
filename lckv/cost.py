"""What a sharing map costs and saves: operations of training, bytes of KV cache.

Formula, per token, counting a multiplication and an addition as 2 FLOPs. A layer's forward is
    query 2 h a + output 2 a h + keys and values 2 h 2 g d (if it computes any) + attention 4 a n + MLP 6 h f
with h hidden size, a = query heads x d, g KV heads, d channels of a head, f MLP width, n keys that a query
sees on average. Backward is
twice the forward. A kept pass counts forward + backward; a pass of the plan without gradient counts the
forward only; the passes before
the kept one stop at the keys and values of the group's top layer, and in the first of them cyclic layers run
their MLP alone.
"""

from dataclasses import dataclass

from lckv.config import CompressionConfig
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import LayerGroup, layer_groups


@dataclass(frozen=True)
class ModelShape:
    """The sizes that costs depend on."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    """As computed with, padding included."""
    seq_length: int
    """Tokens of a training sequence."""


@dataclass(frozen=True)
class LayerCost:
    """FLOPs per token of one layer's forward."""

    query_and_output: float
    keys_values: float
    attention: float
    feed_forward: float

    @property
    def forward(self) -> float:
        """All of it."""
        return self.query_and_output + self.keys_values + self.attention + self.feed_forward


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs per token of one training step."""

    model_flops: float
    """What the method asks for: every pass of the plan, K/V projections only where a layer has them; no
    recomputation."""

    hardware_flops: float
    """model_flops and the forward of layers recomputed in backward."""

    plain_flops: float
    """A plain model of the same sizes, without recomputation."""

    @property
    def ratio(self) -> float:
        """Predicted time of a step relative to the plain model of the same sizes."""
        return self.model_flops / self.plain_flops


def average_keys(seq_length: int, *, exclude_self: bool, window: int | None) -> float:
    """n: keys that a query of a row of `seq_length` tokens sees on average."""
    seen = min(window or seq_length, seq_length) - exclude_self
    rows = seq_length - exclude_self
    growing = min(seen, rows)
    return (growing * (growing + 1) / 2 + (rows - growing) * seen) / seq_length


def layer_costs(shape: ModelShape, compression: CompressionConfig) -> tuple[LayerCost, ...]:
    """The forward of each layer."""
    layer_types = compression.map(shape.num_layers)
    width = shape.query_heads * shape.head_dim
    costs = []
    for layer in layer_types:
        keys = average_keys(
            shape.seq_length,
            exclude_self=layer.cyclic or compression.force_nodiag,
            window=compression.sliding_window if layer.sliding else None,
        )
        owns = layer.index in layer_types.kv_layers
        costs.append(
            LayerCost(
                query_and_output=4.0 * shape.hidden_size * width,
                keys_values=4.0 * shape.hidden_size * shape.kv_heads * shape.head_dim * owns,
                attention=4.0 * width * keys,
                feed_forward=6.0 * shape.hidden_size * shape.ffn_size,
            )
        )
    return tuple(costs)


def training_cost(
    shape: ModelShape, compression: CompressionConfig, *, recomputed_layers: int = 0
) -> TrainingCost:
    """FLOPs per token of a training step; the lowest `recomputed_layers` layers run their forward again in
    backward."""
    layer_types = compression.map(shape.num_layers)
    costs = layer_costs(shape, compression)
    head = 6.0 * shape.hidden_size * shape.vocab_size
    total = head + sum(3 * cost.forward for cost in costs)
    again = sum(cost.forward for cost in costs[:recomputed_layers])
    for group in layer_groups(layer_types):
        if group.iterated:
            extra, recomputed = _preparing_passes(group, layer_types, costs, compression, recomputed_layers)
            total, again = total + extra, again + recomputed
    plain = layer_costs(shape, CompressionConfig())
    return TrainingCost(total, total + again, head + sum(3 * cost.forward for cost in plain))


def _preparing_passes(
    group: LayerGroup,
    layer_types: LayerTypes,
    costs: tuple[LayerCost, ...],
    compression: CompressionConfig,
    recomputed_layers: int,
) -> tuple[float, float]:
    """FLOPs per token of the passes over a group before the kept one, and of what recomputation adds to
    them."""
    passes = compression.forward_passes + compression.backward_passes - 1
    total = again = 0.0
    for number in range(passes):
        with_gradient = number >= compression.forward_passes
        for index in range(group.start, group.stop):
            cost = costs[index]
            if index == group.stop - 1:
                flops, recomputable = cost.keys_values, False
            elif number == 0 and layer_types[index].cyclic:
                flops, recomputable = cost.feed_forward + cost.keys_values, False
            else:
                flops, recomputable = cost.forward, index < recomputed_layers
            total += flops * (3 if with_gradient else 1)
            again += flops * (with_gradient and recomputable)
    return total, again


def kv_bytes_per_token(shape: ModelShape, layer_types: LayerTypes, *, bytes_per_number: int = 2) -> int:
    """KV cache of one token of context: keys and values of the layers that compute them."""
    return len(layer_types.kv_layers) * 2 * shape.kv_heads * shape.head_dim * bytes_per_number
