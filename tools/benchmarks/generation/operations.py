"""How many operations reading a prompt takes; see lckv/cost.py for those of a layer."""

from lckv.cost import ModelShape, forward_flops, layer_costs
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.sharing.plan import iteration_plan


def prefill_flops(config: LCKVLlamaConfig, tokens: int, passes: int) -> float:
    """Of a prompt of `tokens` tokens with `passes` passes over iterated layers,
    up to the logits of the last token."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    shape = ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        seq_length=tokens,
    )
    compression = config.compression_config()
    layer_types, costs = compression.map(config.num_hidden_layers), layer_costs(shape, compression)
    per_token = forward_flops(iteration_plan(layer_types, passes - 1, 1), costs)
    return per_token * tokens + 2.0 * shape.hidden_size * shape.vocab_size
