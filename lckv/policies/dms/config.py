"""Settings of the DMS policy."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lckv.attention.key_bias import KeyBias
from lckv.errors import Problem
from lckv.policies.config import PolicyConfig, Projection, Reach, Traits
from lckv.policies.staged_config import StagedConfig

if TYPE_CHECKING:
    from lckv.policies.base import KVPolicy

EXTRA_CHANNELS = 8
"""Of queries and keys: no channel of a key is free, so the bias has one of its own."""
ADAPTER = "dms_proj_alpha"
"""What published models call it."""

_SOURCES = ("borrowed_channel", "adapter")
_GRANULARITIES = ("kv_head", "layer")


@dataclass(frozen=True)
class DMSConfig(StagedConfig):
    """Evict tokens late: each KV head decides about every token whether it is dropped once it has left a
    window (Dynamic Memory Sparsification, Łańcucki et al. 2025)."""

    effect: ClassVar = "dropped"
    without: ClassVar = "drops nothing"

    name: Literal["dms"] = "dms"
    """Name of the KV policy."""

    stage: Literal["zero_out", "retrofit", "finetune"] = "zero_out"
    """zero_out fades the borrowed channel of queries to 0, which frees it for decisions; an adapter needs no
    such stage. retrofit trains decisions while the target compression ratio rises; finetune keeps the target,
    and is also the stage in which a model is used."""

    decision_source: Literal["borrowed_channel", "adapter"] = "borrowed_channel"
    """What decisions are read from: borrowed_channel, the last channel of the first query head of each KV
    head, which attention loses; or adapter, a linear map of the layer's input with an RMSNorm in front, which
    adds hidden size x (KV heads + 1) parameters to each layer that computes keys and values."""

    decisions_per: Literal["kv_head", "layer"] = "kv_head"
    """Who decides: each KV head for itself, or the first one of the layer for all."""

    target_compression_ratio: float = 8.0
    """CR: tokens per slot to reach, at least 1. The published model: 8."""

    initial_compression_ratio: float = 1.0
    """CR that stage retrofit begins with, at least 1 and at most the target."""

    ramp: float = 1.0
    """Share of stage retrofit after which the target is reached, above 0 and at most 1."""

    window: int = 512
    """W: tokens behind a token for which it is seen whatever was decided; at least 1. A token that is to be
    dropped goes when W + 1 are behind it."""

    decision_scale: float = 100.0
    """What the borrowed channel, or the adapter's number, is multiplied by, to be a decision logit."""

    initial_decision_offset: float = 5.0
    """Subtracted from the decision logit, so that every token is kept at first."""

    temperature: float = 0.1
    """Of the noisy decisions in training."""

    loss_weight: float = 1.0
    """Of the compression loss, next to the mean cross-entropy per token."""

    @property
    def adapts(self) -> bool:
        """Whether an adapter decides, and no channel is borrowed."""
        return self.decision_source == "adapter"

    @property
    def channel(self) -> str:
        """See `StagedConfig`."""
        return "adapter" if self.adapts else "borrowed channel"

    @property
    def traits(self) -> Traits:
        """See `PolicyConfig`. The decision about a token is that of the token behind it."""
        if not self.decides:
            return Traits(windows=False, two_sources=False, reach=Reach())
        of_layers = self.decisions_per == "layer"
        return Traits(
            KeyBias(max(1, self.window + 1), EXTRA_CHANNELS),
            reads_query=not self.adapts,
            projection=Projection(ADAPTER, of_layers) if self.adapts else None,
            mixes_heads=of_layers and not self.adapts,
            windows=False,
            reach=Reach(after=1),
        )

    def build(self) -> "KVPolicy":
        """See `PolicyConfig`."""
        from lckv.policies.dms.policy import DMSPolicy

        return DMSPolicy(self)

    def problems(self) -> Iterator[Problem]:
        """See `PolicyConfig`."""
        yield from super().problems()
        if self.decision_source not in _SOURCES:
            obstacle = f"it must be one of {', '.join(_SOURCES)}"
            yield Problem("decision_source", repr(self.decision_source), obstacle)
        if self.decisions_per not in _GRANULARITIES:
            obstacle = f"it must be one of {', '.join(_GRANULARITIES)}"
            yield Problem("decisions_per", repr(self.decisions_per), obstacle)
        if self.adapts and self.stage == "zero_out":
            obstacle = (
                "it frees the borrowed channel, and decision_source is adapter, which borrows none: set the "
                "stage to retrofit"
            )
            yield Problem("stage", self.stage, obstacle)
        if (
            self.target_compression_ratio >= 1
            and not 1 <= self.initial_compression_ratio <= self.target_compression_ratio
        ):
            obstacle = f"it must be from 1 to target_compression_ratio, {self.target_compression_ratio}"
            yield Problem("initial_compression_ratio", self.initial_compression_ratio, obstacle)
        if not 0 < self.ramp <= 1:
            obstacle = "it must be above 0 and at most 1: it is a share of the stage"
            yield Problem("ramp", self.ramp, obstacle)
        if self.window < 1:
            obstacle = "it must be at least 1 token. The published value is 512"
            yield Problem("window", self.window, obstacle)
        if not 0 < self.decision_scale < math.inf:
            obstacle = "it must be greater than 0, and finite. The published value is 100"
            yield Problem("decision_scale", self.decision_scale, obstacle)
        if not 0 < self.initial_decision_offset < math.inf:
            obstacle = (
                "it must be greater than 0, or every token would be dropped from the start, and finite. The "
                "published value is 5"
            )
            yield Problem("initial_decision_offset", self.initial_decision_offset, obstacle)

    def obstacle_to_leaving(self, after: PolicyConfig) -> str | None:
        """Trained decisions go on only where they are read."""
        if self.decides and isinstance(after, DMSConfig) and after.decides:
            for name in ("decision_source", "decisions_per"):
                before, now = getattr(self, name), getattr(after, name)
                if before != now:
                    return (
                        f"its {name} is {before}, which training has made what they are, and not {now}. Set "
                        f"it to {before}"
                    )
        return super().obstacle_to_leaving(after)

    def obstacle_to_converting(self, before: PolicyConfig) -> str | None:
        """An adapter, which is added with zeros, drops nothing yet."""
        return None if self.adapts else super().obstacle_to_converting(before)

    def slots(self, tokens: int, compression_ratio: float) -> int:
        """The window, of which nothing is dropped yet, and what stays of the tokens before it."""
        if not self.decides:
            return ceil(tokens / compression_ratio)
        newest = min(tokens, self.window + 1)
        return newest + ceil((tokens - newest) / compression_ratio)

    def state_numbers(self, head_dim: int) -> int:
        """The decisions of the newest W tokens; see `eviction.py`."""
        return self.window if self.decides else 0

    def kept_bytes(
        self, *, query_heads: float, kv_heads: float, head_dim: int, bytes_per_number: int
    ) -> float:
        """See `PolicyConfig`. Logits, decisions and biases, float32, some times."""
        return 4 * 8 * kv_heads if self.decides else 0.0

    def describe(self) -> str:
        """See `PolicyConfig`."""
        return (
            f"dms, stage {self.stage}: target {self.target_compression_ratio:g} tokens per slot, window "
            f"{self.window}{', decisions of an adapter' if self.adapts else ''}"
            f"{', one for all heads of a layer' if self.decisions_per == 'layer' else ''}"
        )

    def card(self) -> str:
        """See `PolicyConfig`."""
        decides = "The first KV head of each layer" if self.decisions_per == "layer" else "Each KV head"
        reads = ", from an adapter of the layer's input," if self.adapts else ""
        return (
            f"Dynamic Memory Sparsification, stage {self.stage}, trained towards "
            f"{self.target_compression_ratio:g} tokens per slot. {decides} decides about every token{reads} "
            f"whether it is dropped once it is more than {self.window} tokens old."
        )

    @property
    def references(self) -> tuple[str, ...]:
        """See `PolicyConfig`."""
        return (
            (
                "DMS: Łańcucki, Staniszewski, Nawrot, Ponti. *Inference-Time Hyper-Scaling with KV Cache "
                "Compression.* NeurIPS 2025, arXiv:2506.05345"
            ),
        )

    @classmethod
    def huggingface_fields(cls) -> tuple[str, ...]:
        """See `PolicyConfig` and `published.py`."""
        from lckv.policies.dms.published import FIELDS

        return FIELDS

    @classmethod
    def from_huggingface_config(cls, config: Mapping[str, Any]) -> "DMSConfig | None":
        """See `PolicyConfig` and `published.py`."""
        from lckv.policies.dms.published import from_config

        return from_config(config)
