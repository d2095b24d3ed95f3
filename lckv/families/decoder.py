"""A decoder of the Llama family: everything that its outputs depend on besides the weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.rope_scaling import Scaling, scaling_problems

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TokenIds = dict[str, int | list[int] | None]
"""Special tokens, by the names of `TOKEN_IDS`."""
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """RMSNorm, SwiGLU, rotary positions, grouped-query attention, and what makes the KV cache small. Names
    are those of Hugging Face's configs."""

    family: str = "lckv-llama"
    """Name of the model family (`registry.py`) from whose config it was read."""

    vocab_size: int
    """Tokens of the vocabulary, without padding."""

    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Width of the gated MLP."""

    num_hidden_layers: int
    """Number of layers."""

    num_attention_heads: int
    """Number of query heads."""

    num_key_value_heads: int
    """Number of key/value heads."""

    head_dim: int
    """Channels of one head."""

    max_position_embeddings: int
    """Longest context, in tokens; with dynamic scaling of the rotary embedding, that of pretraining."""

    rope_base: float = 10000.0
    """Base of the rotary position embedding (theta)."""

    rope_scaling: Scaling | None = None
    """Scaling of the rotary position embedding."""

    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""

    tie_word_embeddings: bool = False
    """Whether one matrix serves embedding and output layer."""

    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""

    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotary embedding (Qwen3)."""

    attention_dropout: float = 0.0
    """Dropout probability of attention weights, in training."""

    initializer_range: float = 0.02
    """Standard deviation of initial weights."""

    compression: CompressionConfig = field(default_factory=CompressionConfig)
    """Sharing map, passes, window, and KV policy."""

    token_ids: TokenIds = field(default_factory=dict)
    """Special tokens."""

    dtype: torch.dtype = torch.float32
    """Of the weights, one of `lckv.weights.tensors.WEIGHT_DTYPES`."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these sizes and settings: field, value, way out."""
        return [
            *self._size_problems(),
            *self._rope_problems(),
            *(
                str(wrong.under("compression"))
                for wrong in self.compression.problems_of_model(self.num_hidden_layers)
            ),
            *self._policy_problems(),
        ]

    def _size_problems(self) -> Iterator[str]:
        for name in _SIZES:
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1."
        for name in ("rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                yield f"{name} is {getattr(self, name)}; it must be greater than 0."
        groups = self.num_key_value_heads
        if groups >= 1 and self.num_attention_heads % groups:
            yield (
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, which is {groups}."
            )
        if self.head_dim % 2:
            yield (
                f"head_dim is {self.head_dim}; it must be even, because rotary embeddings turn pairs of "
                "channels."
            )

    def _rope_problems(self) -> Iterator[str]:
        if not 0 < self.rope_base < math.inf:
            yield f"rope_theta is {self.rope_base}; it must be greater than 0."
        for problem in scaling_problems(self.rope_scaling, self.head_dim, self.rope_base):
            yield str(problem.under("rope_scaling"))

    def _policy_problems(self) -> Iterator[str]:
        policy = self.compression.policy
        if not 0 <= self.attention_dropout < 1:
            yield f"attention_dropout is {self.attention_dropout}; it must be at least 0 and below 1."
        elif self.attention_dropout > 0 and not policy.traits.dropout:
            yield (
                f"attention_dropout is {self.attention_dropout}; it must be 0 with the policy {policy.name} "
                "(compression.policy), whose keys carry a bias."
            )
        if self.head_dim < policy.traits.min_head_dim:
            yield (
                f"head_dim is {self.head_dim}; it must be at least {policy.traits.min_head_dim} with the "
                f"policy {policy.name} (compression.policy)."
            )


def default_head_dim(hidden_size: int, num_attention_heads: int) -> int:
    """Channels of a head where a config does not say it.

    Raises ModelError where the heads do not divide the hidden size.
    """
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ModelError(
            f"hidden_size is {hidden_size}; it must be a multiple of num_attention_heads, which is "
            f"{num_attention_heads}, or head_dim must be given."
        )
    return hidden_size // num_attention_heads
