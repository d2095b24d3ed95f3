"""The sizes of a run's model, for lckv.cost."""

from lckv.cost import ModelShape
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
