"""The layers of an LCKV model: its weights under Hugging Face's names, and how the plan of a sharing map runs
them.

Shapes: b rows, s new tokens, h query heads, g KV heads, d channels of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lckv.attention.backends import Attend, choose
from lckv.attention.visibility import Visibility
from lckv.cache.base import KVCache
from lckv.errors import UnsupportedError
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.policies.base import Extension, Statistics, TokenContext

_BACKENDS = {"eager": "reference", "sdpa": "sdpa", "flash_attention_2": "flash"}
"""Hugging Face's names of attention implementations, and those of `lckv.attention`."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What one forward pass knows of its tokens."""

    contexts: Mapping[int, TokenContext]
    """By layer; they differ in noise."""
    counted: Tensor | None
    cache: KVCache | None
    """Where keys and values go, if they are wanted, and those of earlier tokens."""

    @property
    def past(self) -> KVCache | None:
        """The cache, if it holds anything."""
        return None if self.cache is None or self.cache.empty else self.cache


class LCKVLlamaAttention(nn.Module):
    """Self-attention of one layer of a sharing map.
    A layer that only reads keys and values has no weights for them."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        compression = config.compression_config()
        layer_types = compression.map(config.num_hidden_layers)
        layer = layer_types[layer_idx]
        self.config, self.layer_idx, self.source = config, layer_idx, layer.source
        self.computes_kv = layer_idx in layer_types.kv_layers
        self.policy = compression.policy.build()
        self.visibility = Visibility(*compression.sight(layer))
        self.head_dim, self.kv_heads, hidden = config.head_dim, config.num_key_value_heads, config.hidden_size
        width, kv_width = (heads * self.head_dim for heads in (config.num_attention_heads, self.kv_heads))
        self.q_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        if self.computes_kv:
            self.k_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
            self.v_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            if self.computes_kv:
                self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, source: Extension | None, tokens: Tokens
    ) -> tuple[Tensor, Extension | None, Statistics]:
        """Attend from [b, s, hidden] to `source`, or to the layer's own keys and values; they and their
        statistics are returned."""
        query = self._heads("q", hidden_states)
        own, statistics = self.keys_values(hidden_states, tokens, query) if self.computes_kv else (None, ())
        reads = own if source is None else source
        if reads is None:
            raise ValueError(
                f"layer {self.layer_idx} reads the keys and values of layer {self.source}, which were not "
                "given to it."
            )
        query = self.policy.query(query, tokens.contexts[self.layer_idx]).permute(1, 2, 0, 3)
        output = self._attend(query, reads, tokens).transpose(1, 2).flatten(2)
        return self.o_proj(output), own, statistics

    def keys_values(
        self, hidden_states: Tensor, tokens: Tokens, query: Tensor | None = None
    ) -> tuple[Extension, Statistics]:
        """The layer's keys and values from [b, s, hidden]; `query` [s, b, h, d] saves projecting it where the
        policy reads it. There are no statistics where there is a cache."""
        reads_query = self.policy.traits.reads_query
        if query is None and reads_query:
            query = self._heads("q", hidden_states)
        key, value, context = (
            self._heads("k", hidden_states),
            self._heads("v", hidden_states),
            tokens.contexts[self.layer_idx],
        )
        query = query if reads_query else None
        if tokens.cache is not None:
            state = None if tokens.past is None else tokens.past.state(self.layer_idx)
            return self.policy.extend(state, key, value, query, context), ()
        own, statistics = self.policy.keys_values(key, value, query, context)
        return Extension(*own), statistics

    def _heads(self, name: str, hidden_states: Tensor) -> Tensor:
        """Projected (and normalised) heads [s, b, heads, d], before RoPE."""
        heads = getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim))
        norm = getattr(self, f"{name}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(0, 1)

    def _attend(self, query: Tensor, reads: Extension, tokens: Tokens) -> Tensor:
        scale, key_bias = self.head_dim**-0.5, self.policy.traits.key_bias
        if tokens.past is not None:
            return tokens.past.attend(
                self.source, query, reads, tokens.counted, self.visibility, scale=scale, key_bias=key_bias
            )
        visibility = replace(self.visibility, documents=tokens.contexts[self.layer_idx].documents)
        dropout = self.config.attention_dropout if self.training else 0.0
        key, value = (tensor.permute(1, 2, 0, 3) for tensor in (reads.key, reads.value))
        return self._backend(query)(
            query, key, value, visibility, scale=scale, dropout=dropout, key_bias=key_bias
        )

    def _backend(self, query: Tensor) -> Attend:
        name = self.config._attn_implementation or "sdpa"
        if name not in _BACKENDS:
            raise ValueError(f"attn_implementation is {name!r}; this model has {', '.join(_BACKENDS)}.")
        try:
            return choose(
                _BACKENDS[name], device=query.device, dtype=query.dtype, head_dim=query.shape[-1]
            ).attend
        except UnsupportedError as error:
            raise ValueError(
                f"attn_implementation is {name!r}, but {error.obstacle}. Set attn_implementation to sdpa."
            ) from error


class LCKVLlamaMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[b, s, hidden] to the same."""
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


_Flat = tuple[Tensor | None, ...]
"""Hidden states, then the fields of the layer's own `Extension`, then its statistics:
what checkpointing can pass on."""


_NO_EXTENSION = (None,) * len(Extension._fields)


class LCKVLlamaDecoderLayer(nn.Module):
    """A layer, of which a pass of the plan may need only a part."""

    _gradient_checkpointing_func: Callable[..., _Flat]
    """transformers sets it, and `gradient_checkpointing`."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LCKVLlamaAttention(config, layer_idx)
        self.mlp = LCKVLlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, tokens: Tokens, part: str, *source: Tensor | None) -> _Flat:
        """`part` is "all", "keys_values" (nothing else is returned) or "without_source" (attention is left
        out, as if it were 0). `source` are the fields of what the layer reads, if it reads another's.
        Everything goes through here, so that hooks
        on the module (sharded or offloaded weights) see every use."""
        if part == "keys_values":
            own, statistics = self.self_attn.keys_values(self.input_layernorm(hidden_states), tokens)
            return hidden_states, *own, *statistics
        own_or_none: Extension | None = None
        statistics = ()
        if part == "all":
            reads = Extension(*source) if source else None  # type: ignore[arg-type]
            output, own_or_none, statistics = self.self_attn(
                self.input_layernorm(hidden_states), reads, tokens
            )
            hidden_states = hidden_states + output
        elif self.self_attn.computes_kv:
            own_or_none, statistics = self.self_attn.keys_values(self.input_layernorm(hidden_states), tokens)
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, *(own_or_none or _NO_EXTENSION), *statistics


class PlannedLayers:
    """The model's layers for one forward pass, as the plan calls them."""

    def __init__(
        self, layers: Sequence[LCKVLlamaDecoderLayer], tokens: Tokens, hidden_states: list[Tensor] | None
    ) -> None:
        """Each layer's result in the pass that counts is added to `hidden_states`,
        if there is such a list."""
        self._layers, self._tokens, self._hidden_states = layers, tokens, hidden_states
        self.kept: dict[int, Extension] = {}
        """Keys and values of the pass that counts, if there is a cache for them."""
        self.statistics: dict[int, Statistics] = {}

    def run(
        self, index: int, hidden_states: Tensor, source: Extension | None, *, kept: bool
    ) -> tuple[Tensor, Extension | None]:
        """The whole layer, recomputed in backward where gradient checkpointing is on."""
        layer = self._layers[index]
        call: Callable[..., _Flat] = layer
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            call = partial(layer._gradient_checkpointing_func, layer)
        hidden_states, own, statistics = _unflat(call(hidden_states, self._tokens, "all", *(source or ())))
        if kept and self._hidden_states is not None:
            self._hidden_states.append(hidden_states)
        if kept and own is not None and self._tokens.cache is not None:
            self.kept[index] = own
        if kept and statistics:
            self.statistics[index] = statistics
        return hidden_states, own

    def keys_values(self, index: int, hidden_states: Tensor) -> Extension:
        """The layer's keys and values alone."""
        own = _unflat(self._layers[index](hidden_states, self._tokens, "keys_values"))[1]
        assert own is not None
        return own

    def run_without_source(self, index: int, hidden_states: Tensor) -> tuple[Tensor, Extension | None]:
        """Without older tokens attention to zero keys and values is exactly 0;
        with some, the zeros are among them."""
        if self._tokens.past is not None:
            return self.run(index, hidden_states, self.zeros(hidden_states), kept=False)
        return _unflat(self._layers[index](hidden_states, self._tokens, "without_source"))[:2]

    def zeros(self, hidden_states: Tensor) -> Extension:
        """Keys and values before the first pass."""
        attention = self._layers[0].self_attn
        rows, tokens = hidden_states.shape[:2]
        key_bias, shape = attention.policy.traits.key_bias, (tokens, rows, attention.kv_heads)
        extra = 0 if key_bias is None else key_bias.extra_channels
        return Extension(
            hidden_states.new_zeros(*shape, attention.head_dim + extra),
            hidden_states.new_zeros(*shape, attention.head_dim),
        )


def _unflat(flat: _Flat) -> tuple[Tensor, Extension | None, Statistics]:
    hidden_states, key, value, hides, state, *statistics = flat
    assert hidden_states is not None
    own = None if key is None or value is None else Extension(key, value, hides, state)
    return hidden_states, own, tuple(tensor for tensor in statistics if tensor is not None)
