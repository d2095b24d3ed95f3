"""Dynamic Memory Sparsification as a KV policy: tokens are dropped some time after it was decided."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lckv.policies import stages
from lckv.policies.base import (
    ChannelRows,
    Extension,
    KeyValue,
    KVPolicy,
    Statistic,
    Statistics,
    TokenContext,
)
from lckv.policies.binary_decisions import decision_rate, draw_noise
from lckv.policies.config import PolicyConfig
from lckv.policies.dms import eviction
from lckv.policies.dms.channels import decision_logits, scale_borrowed, widened
from lckv.policies.dms.config import DMSConfig


class DMSPolicy(KVPolicy):
    """Drops tokens.

    In stage zero_out nothing is dropped: the borrowed channel of queries fades. In the others it decides and
    attends no more. The bias of a key is in a channel of its own; that of a query is sqrt(d), which
    attention's scale 1 / sqrt(d) turns into 1. Only layers that compute keys and values decide and lend.
    """

    config: DMSConfig

    def __init__(self, config: DMSConfig) -> None:
        super().__init__(config)
        if config.decides:
            self.statistics = (Statistic("eviction_rate", "share of tokens that drop the one before"),)

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """Noise of the decisions; None where there are none."""
        return draw_noise(shape, seeds, device) if self.config.decides else None

    def query(self, query: Tensor, context: TokenContext, kv_heads: int | None = None) -> Tensor:
        """RoPE, without the borrowed channel or with what is left of it, before and after."""
        factor = 0.0 if self.config.decides else stages.fade(context.progress)
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

    def target(self, progress: float) -> float:
        """The compression ratio that is asked for at a share `progress` of training."""
        config = self.config
        return stages.compression_ratio(
            config.target_compression_ratio,
            config.stage,
            progress,
            initial=config.initial_compression_ratio,
            ramp=config.ramp,
        )

    def auxiliary_loss(self, means: Sequence[Tensor], progress: float) -> Tensor | None:
        """Loss of each row for dropping less than the target asks for; None in stage zero_out."""
        if not self.config.decides:
            return None
        return self.config.loss_weight * stages.hinge_loss(means[0], self.target(progress))

    def report(self, means: Sequence[Tensor], loss: float, progress: float | None) -> dict[str, float]:
        """The loss, and the compression ratios asked for and decided on,
        in tokens per slot over all layers and heads."""
        if not self.config.decides:
            return {}
        reached = {"compression_ratio": stages.ratio_of_rate(means[0].mean().item())}
        if progress is None:
            return reached
        return {"dms_loss": loss, "target_compression_ratio": self.target(progress), **reached}

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

    def obstacle_in_weights(self, rows: ChannelRows, before: PolicyConfig) -> str | None:
        """Decisions cannot begin in a channel that means something else."""
        if not self.config.decides or (isinstance(before, DMSConfig) and before.decides):
            return None
        largest = max((row.abs().max().item() for row in rows("first query", -1)), default=0.0)
        if largest == 0:
            return None
        return (
            f"stage is {self.config.stage}, but the loaded weights use the borrowed channel (the last one of "
            f"the first query head of each group; its largest weight is {largest:.3g}), so decisions would "
            "be arbitrary. Run stage zero_out first, to its end, and load what it saves"
        )

    @torch.no_grad()
    def end_stage(self, rows: ChannelRows) -> str | None:
        """The end of stage zero_out: weights (and biases) of the borrowed channels become 0."""
        if self.config.decides:
            return None
        for row in rows("first query", -1):
            row.zero_()
        return "stage zero_out is over: the borrowed channel of the first query head of each group is 0"
