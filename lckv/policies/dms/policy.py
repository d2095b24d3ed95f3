"""Dynamic Memory Sparsification as a KV policy: tokens are dropped some time after it was decided."""

from collections.abc import Iterator, Sequence
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
from lckv.policies.config import PolicyConfig
from lckv.policies.dms import eviction
from lckv.policies.dms.channels import decision_logits, of_first_head, scaled_around, widened
from lckv.policies.dms.config import DMSConfig
from lckv.policies.stages import StagedPolicy, fade


class DMSPolicy(StagedPolicy):
    """Drops tokens.

    In stage zero_out nothing is dropped: the borrowed channel of queries fades. In the others it decides and
    attends no more; or an adapter decides, and queries keep all channels. The bias of a key is in a channel
    of its own; that of a query is sqrt(d), which attention's scale 1 / sqrt(d) turns into 1. Only layers that
    compute keys and values decide and lend.
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
        if kv_heads is None or self.config.adapts:
            query = context.rotate(query)
        else:
            query = scaled_around(context.rotate, query, kv_heads, factor)
        return widened(query, channels**0.5) if self.config.decides else query

    def keys_values(
        self, key: Tensor, value: Tensor, read: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics]:
        """Decisions, RoPE, and the bias of what was decided to be dropped;
        attention says from which age on it counts."""
        if not self.config.decides:
            return KeyValue(context.rotate(key), value.contiguous()), ()
        logits = self._logits(read, key)
        if context.training:
            noisy = eviction.noisy_logits(logits, context.noise, self.config.temperature)
            if self._of_layers:  # also noise that was drawn for each head
                noisy = of_first_head(noisy)
            drops, bias = torch.sigmoid(noisy), eviction.soft_bias(noisy, context)
        else:
            drops, bias = (logits > 0).float(), eviction.hard_bias(logits, context)
        rate = decision_rate(drops, logits, context)
        return KeyValue(widened(context.rotate(key), bias), value.contiguous()), (rate,)

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, read: Tensor | None, context: TokenContext
    ) -> Extension:
        """Decisions of the new tokens, about each other and about the newest of the cache."""
        if not self.config.decides:
            return Extension(*self.keys_values(key, value, None, context)[0])
        logits = self._logits(read, key)
        bias = eviction.hard_bias(logits, context)
        if state is None:
            state = eviction.fresh_state(self.config.window, logits)
        hides, state = eviction.advance(state, eviction.without_borders(logits, context), context.counted)
        wide = widened(context.rotate(key), bias)
        return Extension(wide, value, hides, state)

    @property
    def _of_layers(self) -> bool:
        return self.config.decisions_per == "layer"

    def _logits(self, read: Tensor | None, key: Tensor) -> Tensor:
        assert read is not None
        config = self.config
        logits = decision_logits(read, key.shape[2], config.decision_scale, config.initial_decision_offset)
        return of_first_head(logits) if self._of_layers else logits

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """See `StagedPolicy`. Where one head decides for all they have its noise, whichever rank has them."""
        if not self._of_layers:
            return super().draw_noise(shape, seeds, device)
        noise = super().draw_noise((*shape[:2], 1), seeds, device)
        return None if noise is None else noise.expand(*shape)

    def obstacle_in_weights(self, rows: ChannelRows, before: PolicyConfig) -> str | None:
        """See `StagedPolicy`. An adapter needs no free channel."""
        return None if self.config.adapts else super().obstacle_in_weights(rows, before)

    def scripted_shift(
        self, kind: Literal["query", "key", "projection"], heads: Tensor, kv_heads: int
    ) -> Tensor | None:
        """What decides moves, so that the right share of decision logits is above 0."""
        config = self.config
        if kind != ("projection" if config.adapts else "query") or not config.decides:
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
