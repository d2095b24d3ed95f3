"""Dynamic Memory Compression as a KV policy:
keys and values become running means over the tokens merged into a slot."""

import sys
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lckv.policies.base import (
    ChannelRows,
    Extension,
    KeyValue,
    Statistic,
    Statistics,
    TokenContext,
)
from lckv.policies.binary_decisions import decision_rate
from lckv.policies.dmc import continuation, decisions
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.pooling import pool, pool_parts
from lckv.policies.dmc.shapes import pool_of_shapes
from lckv.policies.stages import StagedPolicy, fade


class DMCPolicy(StagedPolicy):
    """Merges tokens.

    In stage zero_out nothing is merged: the last channel of queries and keys fades. In the others that
    channel of a key is the bias of its score and that of a query sqrt(d), which attention's scale 1 / sqrt(d)
    turns into 1.
    """

    config: DMCConfig
    heads: ClassVar = "all queries and keys"

    def __init__(self, config: DMCConfig) -> None:
        super().__init__(config)
        self.per_rank = config.loss_per_tp_rank
        if config.decides:
            self.statistics = (Statistic("merge_rate", "share of tokens merged into the slot before"),)

    def kernels_of_shapes(
        self, moved: Callable[[float], None]
    ) -> Iterator[tuple[object, str, Callable[..., object]]]:
        """See `KVPolicy`: pooling."""
        yield sys.modules[__name__], "pool", pool_of_shapes(pool, moved)

    def query(self, query: Tensor, context: TokenContext, kv_heads: int | None = None) -> Tensor:
        """RoPE, without the last channel or with what is left of it."""
        if not self.config.decides:
            return self._fade(query, context)
        return context.rotate(query, last=query.shape[-1] ** 0.5)

    def keys_values(
        self, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics]:
        """Decisions, pooling, RoPE at the newest token of each slot,
        and the bias that hides what was merged later."""
        if not self.config.decides:
            return KeyValue(self._fade(key, context), value), ()
        assert query is not None
        config = self.config
        logits = decisions.decision_logits(key, config.initial_decision_bias)
        weight = self.importance(query, key.shape[2])
        opens = decisions.forced_openings(logits, context)
        if context.training:
            merge, bias = decisions.soft_decisions(logits, opens, context.noise, config.temperature)
        else:
            merge, bias = decisions.hard_decisions(logits, opens)
        if config.window is None and context.part is not None:
            pooled_key, pooled_value = pool_parts(key, value, merge, weight, context.part)
        else:
            pooled_key, pooled_value = pool(key, value, merge, weight, config.window)
        rate = decision_rate(merge, logits, context)
        return KeyValue(context.rotate(pooled_key, last=bias), pooled_value), (rate,)

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> Extension:
        """Hard decisions and pooling that go on where the cache's newest slots ended."""
        if not self.config.decides:
            return Extension(*self.keys_values(key, value, None, context)[0])
        assert query is not None
        config, counted, turn = self.config, context.counted, continuation.Turn(context.counted)
        logits = decisions.decision_logits(key, config.initial_decision_bias)
        weight = self.importance(query, key.shape[2])
        if state is None:
            state = continuation.fresh_state(config.window, key)
        opens = continuation.openings(logits, state, context, turn)
        key, value, logits, weight = (turn.there(tensor) for tensor in (key, value, logits, weight))
        merge, bias = decisions.hard_decisions(logits, opens)
        pooled_key, pooled_value, state = continuation.advance(
            state, key, value, merge, weight, None if counted is None else turn.there(counted), config.window
        )
        rotated = context.rotate(turn.back(pooled_key), last=turn.back(bias))
        return Extension(rotated, turn.back(pooled_value), merge[:1].bool(), state)

    def importance(self, query: Tensor, kv_heads: int) -> Tensor:
        """Weights float32 [s, b, g] of tokens in their slots, from queries [s, b, h, d] before RoPE."""
        eps = torch.finfo(query.dtype).eps if self.config.eps is None else self.config.eps
        return decisions.importance(query, kv_heads, self.config.initial_decision_bias, eps)

    def scripted_shift(
        self, kind: Literal["query", "key", "projection"], heads: Tensor, kv_heads: int
    ) -> Tensor | None:
        """The last channel of keys moves, so that the right share of decision logits is above 0."""
        if kind != "key" or not self.config.decides:
            return None
        appended = heads[..., -1].float().flatten(0, 1).quantile(1 / self.config.target_compression_ratio, 0)
        shift = heads.new_zeros(heads.shape[2:])
        shift[:, -1] = self.config.initial_decision_bias - appended
        return shift

    def decision_rows(self, rows: ChannelRows) -> Iterator[Tensor]:
        """See `StagedPolicy`."""
        yield from rows("query", -1)
        yield from rows("key", -1)

    def _fade(self, heads: Tensor, context: TokenContext) -> Tensor:
        factor = fade(context.progress)
        return _scale_last(context.rotate(_scale_last(heads, factor)), factor)


def _scale_last(heads: Tensor, factor: float) -> Tensor:
    factors = torch.ones(heads.shape[-1], dtype=heads.dtype, device=heads.device)
    factors[-1] = factor
    return heads * factors
