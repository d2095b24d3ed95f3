"""One more token of each row, as the engine computes it: the layers once, from the bottom to the top.

It is `LCKVLlamaModel.run` for one token, which needs no plan of passes: in cyclic layers it sees older tokens
only, so one pass is exact. Modules of a layer are called, layers are not: who has put hooks on layers, or
exchanged them, is served by `run` (`serves`).

Shapes: b rows, h query heads, g KV heads, d channels of a head, e extra channels of the policy's keys.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv.models.layers import LCKVLlamaAttention, LCKVLlamaDecoderLayer
from lckv.models.modeling_lckv_llama import LCKVLlamaModel
from lckv.policies.base import Extension, KeyValue, TokenContext
from lckv.rope import SmallTurn, rotation
from lckv.sharing.mixing import Second


class StepCache(Protocol):
    """Keys and values of earlier tokens, for one more of each row."""

    positions: Tensor
    """int64 [1, b]."""

    @property
    def rope_length(self) -> int:
        """See `KVCache`."""
        ...

    def begin(self) -> None:
        """Before the operators of a step."""
        ...

    def state(self, layer: int) -> Tensor | None:
        """See `KVCache`."""
        ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        new: Extension,
        visibility: Visibility,
        *,
        scale: float,
        key_bias: KeyBias | None,
        second: Second | None = None,
    ) -> Tensor:
        """See `KVCache`; `query` [b, h, d + e], the result [b, h, d]."""
        ...

    def commit(self, extensions: Mapping[int, Extension]) -> None:
        """See `KVCache`."""
        ...


class _Layer(NamedTuple):
    """Modules of a layer, without the way to them."""

    number: int
    source: int
    computes_kv: bool
    visibility: Visibility
    scale: float
    head_dim: int
    before_attention: nn.Module
    query: nn.Module
    key: nn.Module | None
    value: nn.Module | None
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    borrows: int | None
    lends: bool
    reads_too: int | None
    attention: LCKVLlamaAttention
    output: nn.Module
    before_mlp: nn.Module
    mlp: nn.Module


class Decoder:
    """The layers of a model, for steps of one token per row."""

    def __init__(self, model: LCKVLlamaModel) -> None:
        self._model, self._policy, self._kv_heads = model, model.policy, model.config.num_key_value_heads
        self._traits = model.policy.traits
        self._key_bias = self._traits.key_bias
        self._take_apart()
        self._rope = model.config.rotary_embedding()
        self._frequencies: dict[tuple[int, torch.device], Tensor] = {}

    def serves(self) -> bool:
        """Whether layers are no more than their modules: nobody has put hooks on them, or exchanged them.
        Modules that were exchanged since are taken."""
        if not all(modules.get(name) is module for modules, name, module in self._places):
            self._take_apart()
        return not any(
            type(module) not in (LCKVLlamaDecoderLayer, LCKVLlamaAttention)
            or module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in vars(module)
            for module in self._owners
        )

    def __call__(self, tokens: Tensor, cache: StepCache) -> Tensor:
        """[b, hidden] before the language-model head, of the next `tokens` int64 [b], which the cache takes
        in."""
        cache.begin()
        hidden_states = self._model.embed_tokens(tokens)
        context = TokenContext(self._turn(cache, hidden_states.dtype), positions=cache.positions)
        extensions: dict[int, Extension] = {}
        lent: dict[int, KeyValue] = {}
        rows = tokens.shape[0]
        for layer in self._layers:
            normed = layer.before_attention(hidden_states)
            query = _heads(layer.query, layer.query_norm, normed, layer.head_dim)
            if layer.computes_kv:
                key, value = self._keys_values(layer, normed, lent)
                read = self._traits.read(query, layer.attention.projected(hidden_states[:, None]))
                extensions[layer.number] = self._policy.extend(
                    cache.state(layer.number), key, value, read, context
                )
            # A cyclic layer sees nothing of the new token: any keys and values will do.
            new = extensions.get(layer.source)
            second = None if layer.reads_too is None else layer.attention.second
            if second is not None and new is not None:
                new = Extension(*second.joined(new[:2], extensions[second.layer][:2]))
            attended = cache.attend(
                layer.source,
                self._policy.query(query, context, self._kv_heads if layer.computes_kv else None)[0],
                _nothing(query, self._model, self._key_bias) if new is None else new,
                layer.visibility,
                scale=layer.scale,
                key_bias=self._key_bias,
                second=second,
            )
            hidden_states = hidden_states + layer.output(attended.reshape(rows, -1))
            hidden_states = hidden_states + layer.mlp(layer.before_mlp(hidden_states))
        cache.commit(extensions)
        return self._model.norm(hidden_states)

    def _take_apart(self) -> None:
        layers = cast(Sequence[LCKVLlamaDecoderLayer], self._model.layers)
        self._owners = [module for layer in layers for module in (layer, layer.self_attn)]
        # Where each module hangs.
        self._places = [
            (owner._modules, name, module)
            for owner in (self._model.layers, *self._owners)
            for name, module in owner._modules.items()
        ]
        self._layers = [_taken_apart(layer) for layer in layers]

    def _keys_values(self, layer: _Layer, normed: Tensor, lent: dict[int, KeyValue]) -> KeyValue:
        """As the KV policy gets them; `lent` has those of layers below that lend, and gets the layer's."""
        assert layer.key is not None and layer.value is not None
        own = KeyValue(
            _heads(layer.key, layer.key_norm, normed, layer.head_dim),
            _heads(layer.value, None, normed, layer.head_dim),
        )
        if layer.borrows is not None:
            own = layer.attention.mixed(*own, lent[layer.borrows])
        if layer.lends:
            lent[layer.number] = own
        return own

    def _turn(self, cache: StepCache, dtype: torch.dtype) -> SmallTurn:
        """RoPE of the step. Frequencies are made once."""
        name = cache.rope_length, cache.positions.device
        if name not in self._frequencies:
            self._frequencies[name] = self._rope.frequencies(name[0], device=name[1])
        angles = rotation(cache.positions, self._frequencies[name], self._rope.attention_factor)
        return SmallTurn.of(angles, dtype)


def _taken_apart(layer: LCKVLlamaDecoderLayer) -> _Layer:
    attention = layer.self_attn
    return _Layer(
        attention.layer_idx,
        attention.source,
        attention.computes_kv,
        attention.visibility,
        attention.scaling,
        attention.head_dim,
        layer.input_layernorm,
        attention.q_proj,
        attention.k_proj if attention.computes_kv else None,
        attention.v_proj if attention.computes_kv else None,
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
        attention.borrows,
        attention.lends,
        attention.reads_too,
        attention,
        attention.o_proj,
        layer.post_attention_layernorm,
        layer.mlp,
    )


def _heads(projection: nn.Module, norm: nn.Module | None, normed: Tensor, channels: int) -> Tensor:
    """Projected (and normalised) heads [1, b, heads, d], before RoPE."""
    heads = projection(normed).view(1, normed.shape[0], -1, channels)
    return heads if norm is None else norm(heads)


def _nothing(query: Tensor, model: LCKVLlamaModel, key_bias: KeyBias | None) -> Extension:
    """In the shape of the keys and values of a new token."""
    _, rows, _, channels = query.shape
    shape = (1, rows, model.config.num_key_value_heads)
    extra = 0 if key_bias is None else key_bias.extra_channels
    return Extension(query.new_zeros(*shape, channels + extra), query.new_zeros(*shape, channels))
