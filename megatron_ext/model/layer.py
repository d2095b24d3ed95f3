"""A transformer layer of a sharing map: Megatron's layer, with keys and values as arguments and results."""

from typing import Any, NamedTuple

from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from lckv.policies.base import KeyValue, Statistics, TokenContext
from megatron_ext.model.contexts import LayerContext, Own, Source
from megatron_ext.model.transformer_config import SharedKVTransformerConfig


class LayerOutput(NamedTuple):
    """What a layer returns."""

    hidden_states: Tensor
    """[s, b, hidden]."""

    own: KeyValue | None
    """The layer's keys and values, if it computes any."""

    statistics: Statistics
    """What its KV policy reports; () where the layer computes no keys and values."""

    lends: KeyValue | None = None
    """What it lends to layers that mix, see `Own`."""

    @classmethod
    def of(cls, hidden_states: Tensor, own: Own | None) -> "LayerOutput":
        """Of the parts of a layer."""
        if own is None:
            return cls(hidden_states, None, ())
        return cls(hidden_states, own.key_value, own.statistics, own.lends)


class SharedKVLayer(TransformerLayer):
    """Megatron's TransformerLayer (norms, MLP, residuals, recompute, sharding) around `SharedKVAttention`.

    A pass of the plan may need the whole layer (`forward`), its keys and values alone (`keys_values`), or its
    MLP alone (`feed_forward`).
    """

    def __init__(
        self,
        config: SharedKVTransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        **options: Any,
    ) -> None:
        """`layer_number`: place in the stage, from 1. The attribute counts from the bottom of the model, as
        the configuration's placement says."""
        stage = options["pg_collection"].pp.rank()
        added = get_transformer_layer_offset(config, options.get("vp_stage"), stage)  # by Megatron
        number = config.placed.layers_of(stage)[layer_number - 1] + 1
        super().__init__(config, submodules, number - added, **options)

    def forward(self, hidden_states: Tensor, shared: Source | None, context: LayerContext) -> LayerOutput:
        """[s, b, hidden] to the same; `shared` is given iff the layer
        reads other layers' keys and values, or mixes them into its own."""
        normed, projected = self.input_layernorm(hidden_states), self.self_attention.projected(hidden_states)
        output_with_bias, own = self.self_attention(normed, shared, context, projected)
        return LayerOutput.of(self._after(output_with_bias, hidden_states), own)

    def after_attention(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        """What comes after attention, from its result [s, b, h * d] and the layer's input, to [s, b,
        hidden]."""
        return self._after(self.self_attention.linear_proj(attended), hidden_states)

    def _after(self, output_with_bias: tuple[Tensor, Tensor | None], hidden_states: Tensor) -> Tensor:
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return self.feed_forward(add(output_with_bias, hidden_states, self.hidden_dropout))

    def keys_values(self, hidden_states: Tensor, context: LayerContext, lent: KeyValue | None = None) -> Own:
        """The layer's keys and values alone, from its input [s, b, hidden]."""
        normed, projected = self.input_layernorm(hidden_states), self.self_attention.projected(hidden_states)
        return self.self_attention.keys_values(normed, context, lent, projected)

    def first_guess(self, hidden_states: Tensor, tokens: TokenContext) -> KeyValue:
        """What is guessed of the layer's keys and values from the input states of its group, of the rank's
        part of rows."""
        return self.self_attention.first_guess(hidden_states, tokens)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """The second half of the layer: [s, b, hidden] to the same."""
        return self._forward_mlp(hidden_states)
