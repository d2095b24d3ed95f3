"""How many operations reading a prompt takes; see lckv/cost.py for those of a layer."""

from lckv.cost import LayerCost, ModelShape, layer_costs
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import LayerGroup, layer_groups


def prefill_flops(config: LCKVLlamaConfig, tokens: int, passes: int) -> float:
    """Of a prompt of `tokens` tokens with `passes` passes over iterated layers, up to the logits of the last
    token.

    Passes before the last stop at the keys and values of their group's top layer; in the first of them layers
    that read from above run their MLP, and keys and values where they have any, alone.
    """
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
    per_token = sum(cost.forward for cost in costs)
    for group in layer_groups(layer_types):
        if group.iterated and passes > 1:
            per_token += _first_pass(group, layer_types, costs) + (passes - 2) * _middle_pass(group, costs)
    return per_token * tokens + 2.0 * shape.hidden_size * shape.vocab_size


def _first_pass(group: LayerGroup, layer_types: LayerTypes, costs: tuple[LayerCost, ...]) -> float:
    below = range(group.start, group.stop - 1)
    return costs[group.stop - 1].keys_values + sum(
        costs[index].feed_forward + costs[index].keys_values
        if layer_types[index].cyclic
        else costs[index].forward
        for index in below
    )


def _middle_pass(group: LayerGroup, costs: tuple[LayerCost, ...]) -> float:
    return costs[group.stop - 1].keys_values + sum(
        costs[index].forward for index in range(group.start, group.stop - 1)
    )
