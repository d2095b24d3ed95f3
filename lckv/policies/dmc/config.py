"""Settings of the DMC policy."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lckv.attention.key_bias import KeyBias
from lckv.errors import Problem
from lckv.policies.config import Reach, Traits
from lckv.policies.staged_config import StagedConfig

if TYPE_CHECKING:
    from lckv.policies.base import KVPolicy


@dataclass(frozen=True)
class DMCConfig(StagedConfig):
    """Merge tokens: each KV head decides for every token whether it opens a slot or is merged into the last
    one (Dynamic Memory Compression, Nawrot et al. 2024)."""

    effect: ClassVar = "merged"
    without: ClassVar = "knows no merging"

    name: Literal["dmc"] = "dmc"
    """Name of the KV policy."""

    stage: Literal["zero_out", "retrofit", "finetune"] = "zero_out"
    """zero_out fades the last channel of queries and keys to 0, which frees it for decisions; retrofit trains
    decisions while the target compression ratio rises from 1; finetune keeps the target, and is also the
    stage in which a model is used."""

    target_compression_ratio: float = 2.0
    """CR: tokens per slot to reach, at least 1. Published models: 2, 4 and 8."""

    initial_decision_bias: float = 5.0
    """Subtracted from the decision logit, so that every token opens a slot at first;
    also added to the importance logit."""

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

    @property
    def channel(self) -> str:
        """See `StagedConfig`."""
        return "decision channel"

    @property
    def traits(self) -> Traits:
        """See `PolicyConfig`. The last channel of queries and keys is that of the decisions."""
        if not self.decides:
            return Traits(windows=False, two_sources=False, min_head_dim=4, reach=Reach())
        return Traits(
            KeyBias(age=1),
            merges=True,
            reads_query=True,
            windows=False,
            min_head_dim=4,
            # the bias of a key is the decision of the next token; without a window sums are carried
            reach=Reach(0 if self.window is None else self.window - 1, 1),
        )

    def build(self) -> "KVPolicy":
        """See `PolicyConfig`."""
        from lckv.policies.dmc.policy import DMCPolicy

        return DMCPolicy(self)

    def problems(self) -> Iterator[Problem]:
        """See `PolicyConfig`."""
        yield from super().problems()
        if not 0 < self.initial_decision_bias < math.inf:
            obstacle = (
                "it must be greater than 0, or every token would be merged from the start, all into the "
                "first one, and finite. The published value is 5"
            )
            yield Problem("initial_decision_bias", self.initial_decision_bias, obstacle)
        if self.window is not None and self.window < 1:
            yield Problem("window", self.window, "it must be at least 1 token, or null for no window")
        if self.eps is not None and not 0 < self.eps < math.inf:
            obstacle = "it must be greater than 0, and finite, or null for the epsilon of the model's dtype"
            yield Problem("eps", self.eps, obstacle)

    def state_numbers(self, head_dim: int) -> int:
        """Key, value and weight of the newest tokens of the last slot; see `continuation.py`."""
        if not self.decides:
            return 0
        tokens = 1 if self.window is None else max(1, self.window - 1)
        return tokens * (2 * head_dim + 1)

    def kept_bytes(
        self, *, query_heads: float, kv_heads: float, head_dim: int, bytes_per_number: int
    ) -> float:
        """See `PolicyConfig`. Queries a second time; where keys and values are pooled also the mixed
        projection, and float32 weights of the window's tokens, some times."""
        if not self.decides:
            return 0.0
        queries = bytes_per_number * query_heads * head_dim
        if not kv_heads:
            return queries
        mixed = bytes_per_number * (query_heads + 2 * kv_heads) * head_dim
        return queries + mixed + 4 * kv_heads * (3 * (self.window or 0) + 8)

    def describe(self) -> str:
        """See `PolicyConfig`."""
        window = "no window" if self.window is None else f"window {self.window}"
        return f"dmc, stage {self.stage}: target {self.target_compression_ratio:g} tokens per slot, {window}"

    def card(self) -> str:
        """See `PolicyConfig`."""
        return (
            f"Dynamic Memory Compression, stage {self.stage}, trained towards "
            f"{self.target_compression_ratio:g} tokens per slot. Each KV head decides for every token "
            "whether it opens a slot or is merged into the last one."
        )

    @property
    def references(self) -> tuple[str, ...]:
        """See `PolicyConfig`."""
        return (
            (
                "DMC: Nawrot, Łańcucki, Chochowski, Tarjan, Ponti. *Dynamic Memory Compression: Retrofitting "
                "LLMs for Accelerated Inference.* ICML 2024, arXiv:2403.09636"
            ),
        )

    @classmethod
    def from_megatron_arguments(cls, arguments: Mapping[str, Any]) -> "DMCConfig | None":
        """See `PolicyConfig` and `published.py`."""
        from lckv.policies.dmc.published import from_arguments

        return from_arguments(arguments)
