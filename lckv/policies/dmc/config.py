"""Settings of the DMC policy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

STAGES = ("zero_out", "retrofit", "finetune")


@dataclass(frozen=True)
class DMCConfig:
    """Merge tokens: each KV head decides for every token whether it opens a slot or is merged into the last
    one (Dynamic Memory Compression, Nawrot et al. 2024)."""

    name: Literal["dmc"] = "dmc"
    """Name of the KV policy."""

    stage: Literal["zero_out", "retrofit", "finetune"] = "zero_out"
    """zero_out fades the last channel of queries and keys to 0, which frees it for decisions; retrofit trains
    decisions while the target compression ratio rises from 1; finetune keeps the target, and is also the
    stage in which a model is used."""

    target_compression_ratio: float = 2.0
    """CR: tokens per slot to reach, at least 1. Published models: 2, 4 and 8."""

    initial_decision_bias: float = 5.0
    """Subtracted from the decision logit, so that every token opens a slot at first; also added to the
    importance logit."""

    temperature: float = 0.1
    """Of the noisy decisions in training."""

    window: int | None = 12
    """W: newest tokens of a slot that its key and value are the mean of; null: all of them."""

    eps: float | None = None
    """Added to the importance of each token, so that a slot's weight is never 0; null: the machine epsilon of
    the model's dtype."""

    loss_weight: float = 1.0
    """Of the compression loss, next to the mean cross-entropy per token."""

    loss_per_tp_rank: bool = False
    """Compute the compression loss of the KV heads of each tensor-parallel rank by itself, as NVIDIA's public
    code does; the loss then depends on the layout."""

    def problems(self, sliding_window: int | None) -> list[str]:
        """Everything that is wrong with these settings and `compression.sliding_window`: field, value, way
        out."""
        return list(self._problems(sliding_window))

    def _problems(self, sliding_window: int | None) -> Iterator[str]:
        prefix = "compression.policy."
        if self.stage not in STAGES:
            yield f"{prefix}stage is {self.stage!r}; it must be one of {', '.join(STAGES)}."
        if not 1 <= self.target_compression_ratio < math.inf:
            yield (
                f"{prefix}target_compression_ratio is {self.target_compression_ratio}; it must be at least "
                "1: it is "
                "tokens per slot."
            )
        if not 0 < self.initial_decision_bias < math.inf:
            yield (
                f"{prefix}initial_decision_bias is {self.initial_decision_bias}; it must be greater than 0, "
                "or every token "
                "would be merged from the start, all into the first one. The published value is 5."
            )
        if not 0 < self.temperature < math.inf:
            yield (
                f"{prefix}temperature is {self.temperature}; it must be greater than 0. The published value "
                "is 0.1."
            )
        if self.window is not None and self.window < 1:
            yield f"{prefix}window is {self.window}; it must be at least 1 token, or null for no window."
        if self.eps is not None and not 0 < self.eps < math.inf:
            yield (
                f"{prefix}eps is {self.eps}; it must be greater than 0, or null for the epsilon of the "
                "model's dtype."
            )
        if not 0 <= self.loss_weight < math.inf:
            yield f"{prefix}loss_weight is {self.loss_weight}; it must be at least 0."
        if sliding_window is not None:
            yield (
                f"compression.sliding_window is {sliding_window} and {prefix}name is {self.name}; there are "
                "no sliding windows "
                "over merged tokens: remove the window and the 's' in compression.layer_types, or set "
                f"{prefix}name to dense."
            )
