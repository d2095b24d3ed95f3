"""How many operations reading a prompt takes; see lckv/cost.py."""

from lckv.cost import ModelShape, prompt_cost
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.sharing.early_exit import Results


def prefill_flops(
    config: LCKVLlamaConfig, tokens: int, passes: int, results: Results = Results.SOME
) -> float:
    """Of a prompt of `tokens` tokens with `passes` passes over iterated layers,
    up to the logits of the last token; see `prompt_cost`."""
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
    return prompt_cost(shape, config.compression_config(), passes=passes, results=results).flops
