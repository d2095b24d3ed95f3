"""Rows of a model's projections by the channels that they make; see `ChannelRows` of lckv.policies.base."""

from collections.abc import Iterator
from typing import Literal

from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_ext.model.attention import SharedKVAttention

Kind = Literal["query", "first query", "key", "value"]


class StageChannelRows:
    """Of the layers of one pipeline stage, on one tensor-parallel rank."""

    def __init__(self, model: MegatronModule) -> None:
        """`model`: the stage, wrapped or not."""
        self._layers = get_attr_wrapped_model(model, "decoder").layers

    def __call__(self, kind: Kind, channel: int) -> Iterator[Tensor]:
        """Views of the rows, of weights and biases, that make channel `channel` of the heads of `kind`."""
        for layer in self._layers:
            attention: SharedKVAttention = layer.self_attention
            projection = attention.linear_qkv if attention.has_kv_weights else attention.linear_q
            rows = _rows_of_rank(attention, kind, channel)
            for parameter in (projection.weight, projection.bias):
                if parameter is not None:
                    yield from (parameter.data[row] for row in rows)


def fused_rows(query_heads: int, kv_heads: int, head_dim: int, kind: Kind, channel: int) -> list[int]:
    """Rows of a channel in Megatron's fused weight: per KV head its query heads, its key, its value."""
    per_group = query_heads // kv_heads
    heads = {
        "query": range(per_group),
        "first query": (0,),
        "key": (per_group,),
        "value": (per_group + 1,),
    }[kind]
    return [
        (group * (per_group + 2) + head) * head_dim + channel % head_dim
        for group in range(kv_heads)
        for head in heads
    ]


def lone_rows(query_heads: int, head_dim: int, kind: Kind, channel: int) -> list[int]:
    """The same in the weight of a layer that only reads: it makes queries and nothing else."""
    return [head * head_dim + channel % head_dim for head in range(query_heads)] if kind == "query" else []


def _rows_of_rank(attention: SharedKVAttention, kind: Kind, channel: int) -> list[int]:
    """Rows in this rank's part of the layer's projection. Ranks split the rows evenly, also those of one KV
    head where there are more ranks than KV heads."""
    config, ranks, rank = attention.config, attention.world_size, attention.pg_collection.tp.rank()
    queries, groups, channels = config.num_attention_heads, config.num_query_groups, attention.head_dim
    if attention.has_kv_weights:
        rows, heads = fused_rows(queries, groups, channels, kind, channel), queries + 2 * groups
    else:
        rows, heads = lone_rows(queries, channels, kind, channel), queries
    size = heads * channels // ranks
    return [row - rank * size for row in rows if rank * size <= row < (rank + 1) * size]
