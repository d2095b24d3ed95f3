"""The sizes of a run's model, for lckv.cost, and what its KV policy is to save."""

from collections.abc import Iterator

from lckv.cost import ModelShape
from lckv.policies.config import PolicyConfig
from megatron_ext.config import ModelConfig


def model_shape(model: ModelConfig, *, vocab_size: int, seq_length: int) -> ModelShape:
    """`vocab_size` as computed with, padding included."""
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_size=model.ffn_size,
        query_heads=model.num_attention_heads,
        kv_heads=model.query_groups,
        head_dim=model.head_dim,
        vocab_size=vocab_size,
        seq_length=seq_length,
    )


def policy_line(policy: PolicyConfig, *, kv_bytes: int, plain_bytes: int) -> Iterator[str]:
    """What the policy is to make of `kv_bytes` of KV cache per token, next to a plain model's; nothing where
    it keeps every token."""
    if policy.traits.keeps_every_token:
        return
    ratio = policy.compression_ratio
    aim = f"{policy.describe()}: {kv_bytes / ratio:,.0f} bytes per token"
    yield f"KV policy             {aim}, {plain_bytes * ratio / kv_bytes:.2f}x less than a plain model"
