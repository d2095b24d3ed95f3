"""The sizes of a run's model, for lckv.cost, and what its KV policy is to save."""

from lckv.cost import ModelShape
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
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


def merging_line(policy: DenseConfig | DMCConfig, *, kv_bytes: int, plain_bytes: int) -> str | None:
    """What merging is to make of `kv_bytes` of KV cache per token, next to a plain model's; None where
    nothing merges."""
    if not isinstance(policy, DMCConfig) or policy.stage == "zero_out":
        return None
    reached = kv_bytes / policy.target_compression_ratio
    return (
        f"merging               {policy.target_compression_ratio:g} tokens per slot asked for: "
        f"{reached:,.0f} bytes per token, "
        f"{plain_bytes / reached:.2f}x less than a plain model"
    )
