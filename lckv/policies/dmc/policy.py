"""Dynamic Memory Compression as a KV policy:
keys and values become running means over the tokens merged into a slot."""

import sys
from collections.abc import Callable, Iterator, Sequence
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
from lckv.policies.dmc import continuation, decisions
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.pooling import pool, pool_parts
from lckv.policies.dmc.shapes import pool_of_shapes


class DMCPolicy(KVPolicy):
    """Merges tokens.

    In stage zero_out nothing is merged: the last channel of queries and keys fades. In the others that
    channel of a key is the bias of its score and that of a query sqrt(d), which attention's scale 1 / sqrt(d)
    turns into 1.
    """

    config: DMCConfig

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

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """Noise of the decisions; None where there are none."""
        return draw_noise(shape, seeds, device) if self.config.decides else None

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

    def target(self, progress: float) -> float:
        """The compression ratio that is asked for at a share `progress` of training."""
        return stages.compression_ratio(self.config.target_compression_ratio, self.config.stage, progress)

    def auxiliary_loss(self, means: Sequence[Tensor], progress: float) -> Tensor | None:
        """Loss of each row for merging less than the target asks for; None in stage zero_out."""
        if not self.config.decides:
            return None
        loss = self.config.loss_weight * stages.hinge_loss(means[0], self.target(progress))
        return loss if loss.dim() == 1 else loss.mean(1)

    def report(self, means: Sequence[Tensor], loss: float, progress: float | None) -> dict[str, float]:
        """The loss, and the compression ratios asked for and reached,
        in tokens per slot over all layers and heads."""
        if not self.config.decides:
            return {}
        reached = {"compression_ratio": stages.ratio_of_rate(means[0].mean().item())}
        if progress is None:
            return reached
        return {"dmc_loss": loss, "target_compression_ratio": self.target(progress), **reached}

    def scripted_shift(self, kind: Literal["query", "key"], heads: Tensor, kv_heads: int) -> Tensor | None:
        """The last channel of keys moves, so that the right share of decision logits is above 0."""
        if kind != "key" or not self.config.decides:
            return None
        appended = heads[..., -1].float().flatten(0, 1).quantile(1 / self.config.target_compression_ratio, 0)
        shift = heads.new_zeros(heads.shape[2:])
        shift[:, -1] = self.config.initial_decision_bias - appended
        return shift

    def obstacle_in_weights(self, rows: ChannelRows, before: PolicyConfig) -> str | None:
        """Decisions cannot begin in a channel that means something else."""
        if not self.config.decides or (isinstance(before, DMCConfig) and before.decides):
            return None
        largest = max((row.abs().max().item() for row in _decision_rows(rows)), default=0.0)
        if largest == 0:
            return None
        return (
            f"stage is {self.config.stage}, but the loaded weights use the decision channel (the last one of "
            f"queries and keys; its largest weight is {largest:.3g}), so decisions would be arbitrary. Run "
            "stage zero_out first, to its end, and load what it saves"
        )

    @torch.no_grad()
    def end_stage(self, rows: ChannelRows) -> str | None:
        """The end of stage zero_out: weights (and biases) of the last channel of every query and key head
        become 0, which by then changes no output."""
        if self.config.decides:
            return None
        for row in _decision_rows(rows):
            row.zero_()
        return "stage zero_out is over: the decision channel of all queries and keys is 0"

    def _fade(self, heads: Tensor, context: TokenContext) -> Tensor:
        factor = stages.fade(context.progress)
        return _scale_last(context.rotate(_scale_last(heads, factor)), factor)


def _decision_rows(rows: ChannelRows) -> Iterator[Tensor]:
    yield from rows("query", -1)
    yield from rows("key", -1)


def _scale_last(heads: Tensor, factor: float) -> Tensor:
    factors = torch.ones(heads.shape[-1], dtype=heads.dtype, device=heads.device)
    factors[-1] = factor
    return heads * factors
