"""Dynamic Memory Compression as a KV policy: keys and values become running means over the tokens merged into
a slot."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lckv.policies.base import Extension, KeyValue, Statistics, TokenContext
from lckv.policies.dmc import continuation, decisions, schedule
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.pooling import pool


class DMCPolicy:
    """Merges tokens; see `KVPolicy` for the contract.

    In stage zero_out nothing is merged: the last channel of queries and keys fades. In the others that
    channel of a key is the bias of its score and that of a query sqrt(d), which attention's scale 1 / sqrt(d)
    turns into 1.
    """

    name = "dmc"

    def __init__(self, config: DMCConfig) -> None:
        self.config = config
        self.biases_keys = self.reads_query = config.stage != "zero_out"

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """Noise of the decisions; None where there are none."""
        return decisions.draw_noise(shape, seeds, device) if self.biases_keys else None

    def query(self, query: Tensor, context: TokenContext) -> Tensor:
        """RoPE, without the last channel or with what is left of it."""
        if not self.biases_keys:
            return self._fade(query, context)
        return rotate_without_last(query, context, query.shape[-1] ** 0.5)

    def keys_values(
        self, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics | None]:
        """Decisions, pooling, RoPE at the newest token of each slot, and the bias that hides what was merged
        later."""
        if not self.biases_keys:
            return KeyValue(self._fade(key, context), value), None
        assert query is not None
        config = self.config
        logits = decisions.decision_logits(key, config.initial_decision_bias)
        weight = self.importance(query, key.shape[2])
        opens = decisions.forced_openings(logits, context)
        if context.training:
            merge, bias = decisions.soft_decisions(logits, opens, context.noise, config.temperature)
        else:
            merge, bias = decisions.hard_decisions(logits, opens)
        pooled_key, pooled_value = pool(key, value, merge, weight, config.window)
        rate = decisions.merge_rate(merge, logits, context.counted)
        return KeyValue(rotate_without_last(pooled_key, context, bias), pooled_value), Statistics(rate)

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> Extension:
        """Hard decisions and pooling that go on where the cache's newest slots ended."""
        if not self.biases_keys:
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
        rotated = rotate_without_last(turn.back(pooled_key), context, turn.back(bias))
        return Extension(rotated, turn.back(pooled_value), merge[0].bool(), state)

    def whole(self, extension: Extension) -> Tensor | None:
        """Tokens that no later one is merged into: those whose bias hides them from nobody."""
        return extension.key[..., -1] > decisions.HIDDEN / 2 if self.biases_keys else None

    def importance(self, query: Tensor, kv_heads: int) -> Tensor:
        """Weights float32 [s, b, g] of tokens in their slots, from queries [s, b, h, d] before RoPE."""
        eps = torch.finfo(query.dtype).eps if self.config.eps is None else self.config.eps
        return decisions.importance(query, kv_heads, self.config.initial_decision_bias, eps)

    def target(self, progress: float) -> float:
        """The compression ratio that is asked for at a share `progress` of training."""
        return schedule.compression_ratio(self.config.target_compression_ratio, self.config.stage, progress)

    def auxiliary_loss(self, merge_rate: Tensor, progress: float) -> Tensor | None:
        """Loss of each row [b] for merging less than the target asks for.

        `merge_rate` is [b], or for `loss_per_tp_rank` [b, ranks], each rank's mean by itself. None in stage
        zero_out.
        """
        if not self.biases_keys:
            return None
        loss = self.config.loss_weight * schedule.hinge_loss(merge_rate, self.target(progress))
        return loss if loss.dim() == 1 else loss.mean(1)

    def _fade(self, heads: Tensor, context: TokenContext) -> Tensor:
        factor = schedule.fade(context.progress)
        return _scale_last(context.rotate(_scale_last(heads, factor)), factor)


def rotate_without_last(heads: Tensor, context: TokenContext, last: Tensor | float) -> Tensor:
    """RoPE of `heads` [s, b, n, d] as if the last channel were 0, which then becomes `last` [s, b, n]."""
    rotated = context.rotate(_scale_last(heads, 0.0))
    rotated[..., -1] = last
    return rotated


def _scale_last(heads: Tensor, factor: float) -> Tensor:
    factors = torch.ones(heads.shape[-1], dtype=heads.dtype, device=heads.device)
    factors[-1] = factor
    return heads * factors
