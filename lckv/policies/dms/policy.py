"""Dynamic Memory Sparsification as a KV policy: tokens are dropped some time after it was decided."""

from collections.abc import Iterator
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
from lckv.policies.dms import eviction
from lckv.policies.dms.channels import decision_logits, scale_borrowed, widened
from lckv.policies.dms.config import DMSConfig
from lckv.policies.stages import StagedPolicy, fade


class DMSPolicy(StagedPolicy):
    """Drops tokens.

    In stage zero_out nothing is dropped: the borrowed channel of queries fades. In the others it decides and
    attends no more. The bias of a key is in a channel of its own; that of a query is sqrt(d), which
    attention's scale 1 / sqrt(d) turns into 1. Only layers that compute keys and values decide and lend.
    """

    config: DMSConfig
    heads: ClassVar = "the first query head of each group"

    def __init__(self, config: DMSConfig) -> None:
        super().__init__(config)
        if config.decides:
            self.statistics = (Statistic("eviction_rate", "share of tokens that drop the one before"),)

    def query(self, query: Tensor, context: TokenContext, kv_heads: int | None = None) -> Tensor:
        """RoPE, without the borrowed channel or with what is left of it, before and after."""
        factor = 0.0 if self.config.decides else fade(context.progress)
        channels = query.shape[-1]
        if kv_heads is None:
            query = context.rotate(query)
        else:
            query = context.rotate(scale_borrowed(query, kv_heads, factor))
            query = scale_borrowed(query, kv_heads, factor)
        return widened(query, channels**0.5) if self.config.decides else query

    def keys_values(
        self, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics]:
        """Decisions, RoPE, and the bias of what was decided to be dropped;
        attention says from which age on it counts."""
        if not self.config.decides:
            return KeyValue(context.rotate(key), value.contiguous()), ()
        logits = self._logits(query, key)
        if context.training:
            noisy = eviction.noisy_logits(logits, context.noise, self.config.temperature)
            drops, bias = torch.sigmoid(noisy), eviction.soft_bias(noisy, context)
        else:
            drops, bias = (logits > 0).float(), eviction.hard_bias(logits, context)
        rate = decision_rate(drops, logits, context)
        return KeyValue(widened(context.rotate(key), bias), value.contiguous()), (rate,)

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> Extension:
        """Decisions of the new tokens, about each other and about the newest of the cache."""
        if not self.config.decides:
            return Extension(*self.keys_values(key, value, None, context)[0])
        logits = self._logits(query, key)
        if state is None:
            state = eviction.fresh_state(self.config.window, logits)
        hides, state = eviction.advance(state, logits, context.counted)
        wide = widened(context.rotate(key), eviction.hard_bias(logits, context))
        return Extension(wide, value, hides, state)

    def _logits(self, query: Tensor | None, key: Tensor) -> Tensor:
        assert query is not None
        config = self.config
        return decision_logits(query, key.shape[2], config.decision_scale, config.initial_decision_offset)

    def scripted_shift(self, kind: Literal["query", "key"], heads: Tensor, kv_heads: int) -> Tensor | None:
        """The borrowed channel moves, so that the right share of decision logits is above 0."""
        config = self.config
        if kind != "query" or not config.decides:
            return None
        borrowed = heads.unflatten(2, (kv_heads, -1))[:, :, :, 0, -1].float().flatten(0, 1)
        kept = borrowed.quantile(1 / config.target_compression_ratio, 0)
        shift = heads.new_zeros(heads.shape[2:])
        shift.view(kv_heads, -1, heads.shape[3])[:, 0, -1] = (
            config.initial_decision_offset / config.decision_scale - kept
        )
        return shift

    def decision_rows(self, rows: ChannelRows) -> Iterator[Tensor]:
        """See `StagedPolicy`."""
        yield from rows("first query", -1)
