"""The layers of an LCKV model: its weights under Hugging Face's names, and what each part of them computes.

Shapes: b rows, s new tokens, h query heads, g KV heads, d channels of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lckv.attention.backends import Attend, choose
from lckv.attention.past import NewTokens, attend_past, nothing_before
from lckv.attention.visibility import Visibility
from lckv.cache.base import KVCache
from lckv.cache.undecided import Projected, UndecidedCache
from lckv.errors import UnsupportedError
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.interface import OWN, AttentionFunction
from lckv.models.tokens import Layout
from lckv.models.wanted import Wanted
from lckv.policies.base import Extension, KeyValue, Statistics, TokenContext
from lckv.sharing.execution import Two
from lckv.sharing.mixing import Mixture, Second, initial_weight, mixed


@dataclass(frozen=True, eq=False)
class Tokens:
    """What one forward pass knows of its tokens."""

    contexts: Mapping[int, TokenContext]
    """By layer; they differ in noise."""
    layout: Layout
    cache: KVCache | None
    """Where keys and values go, if they are wanted, and those of earlier tokens."""
    function: AttentionFunction | None = None
    """Of others, for attention; None: attention is that of `lckv.attention`."""
    wanted: Wanted | None = None
    """Those that layers above all keys and values run for, with attention of `lckv.attention`; None: all."""

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
        self.mixes, self.lends = layer.mixes, layer_idx in layer_types.lenders
        self.borrows, self.reads_too = layer.borrows, layer.second
        self.mix_scaling_factor = compression.mix_scaling_factor
        self.policy = compression.policy.build()
        self.visibility = Visibility(*compression.sight(layer))
        self.scaling, self.is_causal = config.head_dim**-0.5, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.head_dim, self.kv_heads, hidden = config.head_dim, config.num_key_value_heads, config.hidden_size
        width, kv_width = (heads * self.head_dim for heads in (config.num_attention_heads, self.kv_heads))
        self.q_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        if self.computes_kv:
            self.k_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
            self.v_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        if self.mixes is not None:
            self.key_weight = nn.Parameter(initial_weight(self.mix_scaling_factor))
            self.value_weight = nn.Parameter(initial_weight(self.mix_scaling_factor))
        if compression.first_guess and layer_idx in layer_types.cyclic_sources:
            self.first_guess_k_proj = ZeroLinear(hidden, kv_width, bias=False)
            self.first_guess_v_proj = ZeroLinear(hidden, kv_width, bias=False)
        self.projection = self.policy.traits.projection if self.computes_kv else None
        if self.projection is not None:
            setattr(self, self.projection.norm_name, nn.RMSNorm(hidden, eps=config.rms_norm_eps))
            setattr(self, self.projection.name, ZeroLinear(hidden, self.kv_heads, bias=config.qkv_bias))
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            if self.computes_kv:
                self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        source: Extension | Two[Extension] | None,
        tokens: Tokens,
        wanted: Wanted | None = None,
        projected: Tensor | None = None,
    ) -> tuple[Tensor, "Own | None"]:
        """Attend from [b, s, hidden] to `source`, or to the layer's own keys and values, which are returned
        with what comes of them. `source` of a layer that mixes into its own: what it mixes in. `wanted`:
        attend from these tokens alone; where the layer computes no keys and values, `hidden_states` are
        theirs, [b, q, hidden]. `projected`: see `keys_values`."""
        query = self._heads("q", hidden_states) if wanted is None else None
        source = self._joined(source)
        lent, source = (None, source) if self.borrows is None else (source, None)
        own = None
        if self.computes_kv:
            own = self.keys_values(hidden_states, tokens, query, lent, projected)
        context = tokens.contexts[self.layer_idx]
        if wanted is not None:
            hidden_states = wanted.of(hidden_states) if self.computes_kv else hidden_states
            query, context = self._heads("q", hidden_states), wanted.context
        reads = source
        if reads is None and own is not None:
            reads = own.extension
        if reads is None:
            raise ValueError(
                f"layer {self.layer_idx} reads the keys and values of layer {self.source}, which were not "
                "given to it."
            )
        assert query is not None
        decides = self.kv_heads if self.computes_kv else None
        query = self.policy.query(query, context, decides).permute(1, 2, 0, 3)
        if tokens.function is None:
            output = self._attend(query, reads, tokens, wanted).transpose(1, 2)
        else:
            # Spelt as transformers' models do: vLLM looks for this call in the source.
            attention_interface = ALL_ATTENTION_FUNCTIONS[tokens.function.name]
            key, value = (tensor.permute(1, 2, 0, 3) for tensor in (reads.key, reads.value))
            output, _ = attention_interface(
                self,
                query,
                key,
                value,
                tokens.function.mask,
                dropout=self._dropout,
                scaling=self.scaling,
                **tokens.function.arguments,
            )
        # [b, s, h, d], of some functions [b * s, h * d], to [b, s, h * d].
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), own

    def keys_values(
        self,
        hidden_states: Tensor,
        tokens: Tokens,
        query: Tensor | None = None,
        lent: Extension | None = None,
        projected: Tensor | None = None,
    ) -> "Own":
        """The layer's keys and values from [b, s, hidden]; `query` [s, b, h, d] saves projecting it where the
        policy reads it; `lent`: what a layer that mixes mixes in; `projected`: what `self.projected` made of
        the layer's input. There are no statistics where there is a cache."""
        traits = self.policy.traits
        if query is None and traits.reads_query:
            query = self._heads("q", hidden_states)
        key, value = self.mixed(self._heads("k", hidden_states), self._heads("v", hidden_states), lent)
        lends, context = KeyValue(key, value) if self.lends else None, tokens.contexts[self.layer_idx]
        read = traits.read(query, projected)
        if tokens.cache is not None:
            state = None if tokens.past is None else tokens.past.state(self.layer_idx)
            extension = self.policy.extend(state, key, value, read, context)
            if isinstance(tokens.cache, UndecidedCache):
                made_of = Projected(self.policy, state, key, value, read, context)
                tokens.cache.note(self.layer_idx, extension, made_of)
            return Own(extension, lends, ())
        own, statistics = self.policy.keys_values(key, value, read, context)
        return Own(Extension(*own), lends, statistics)

    @property
    def second(self) -> Second | None:
        """The other layer that it reads, where it reads two."""
        if self.reads_too is None:
            return None
        if self.mixes is None:
            return Second(self.reads_too, None)
        return Second(self.reads_too, Mixture(self.key_weight, self.value_weight, self.mix_scaling_factor))

    def _joined(self, source: Extension | Two[Extension] | None) -> Extension | None:
        """What the layer reads; of what it mixes into its own, that."""
        if not isinstance(source, Two):
            return source
        assert self.second is not None
        return Extension(*self.second.joined(source.first[:2], source.second[:2]))

    def projected(self, inputs: Tensor) -> Tensor | None:
        """What the policy's own parameters make of the layer's input [b, s, hidden], before its norm: [s, b,
        g, 1]; None: it has none, or the layer computes no keys and values."""
        if self.projection is None:
            return None
        norm, linear = getattr(self, self.projection.norm_name), getattr(self, self.projection.name)
        numbers: Tensor = linear(norm(inputs)).transpose(0, 1)
        if self.projection.per_layer:
            numbers = numbers[..., :1].expand_as(numbers)
        return numbers[..., None]

    def mixed(self, key: Tensor, value: Tensor, lent: Extension | KeyValue | None) -> KeyValue:
        """Keys and values [s, b, g, d] before RoPE, with what another layer lends to a layer that mixes."""
        if self.borrows is None:
            return KeyValue(key, value)
        if lent is None:
            raise ValueError(
                f"layer {self.layer_idx} mixes the keys and values of layer {self.borrows} into its own, "
                "which were not given to it."
            )
        return KeyValue(
            mixed(lent.key, key, self.key_weight, self.mix_scaling_factor),
            mixed(lent.value, value, self.value_weight, self.mix_scaling_factor),
        )

    def first_guess(self, hidden_states: Tensor, tokens: Tokens) -> Extension:
        """What is guessed of the layer's keys and values from the input [b, s, hidden] of its group, through
        which no gradient flows. The map is linear in the input divided by its root mean square."""
        normed = nn.functional.rms_norm(
            hidden_states.detach(), hidden_states.shape[-1:], eps=self.config.rms_norm_eps
        )
        key, value = self._heads("first_guess_k", normed), self._heads("first_guess_v", normed)
        return Extension(tokens.contexts[self.layer_idx].rotate(key), value)

    def _heads(self, name: str, hidden_states: Tensor) -> Tensor:
        """Projected (and normalised) heads [s, b, heads, d], before RoPE."""
        heads = getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim))
        norm = getattr(self, f"{name}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(0, 1)

    @property
    def _dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def _attend(self, query: Tensor, reads: Extension, tokens: Tokens, wanted: Wanted | None) -> Tensor:
        scale, key_bias, layout = self.scaling, self.policy.traits.key_bias, tokens.layout
        places = None if wanted is None else wanted.places
        if tokens.past is not None:
            return tokens.past.attend(
                self.source,
                query,
                reads,
                layout.counted,
                self.visibility,
                scale=scale,
                key_bias=key_bias,
                places=places,
                second=self.second,
            )
        backend = self._backend(query)
        key, value = (tensor.permute(1, 2, 0, 3) for tensor in (reads.key, reads.value))
        if wanted is not None:
            counted = layout.counted if layout.masked else None
            new = NewTokens(key, value, counted, None, wanted.document)
            past = nothing_before(new)
            return attend_past(
                query, new, past, self.visibility, scale=scale, key_bias=key_bias, places=places
            )
        if layout.masked:
            new = NewTokens(key, value, layout.counted, None, layout.document)
            return attend_past(
                query, new, nothing_before(new), self.visibility, scale=scale, dropout=self._dropout
            )
        visibility = replace(self.visibility, documents=layout.documents)
        return backend(query, key, value, visibility, scale=scale, dropout=self._dropout, key_bias=key_bias)

    def _backend(self, query: Tensor) -> Attend:
        name, key_bias = self.config._attn_implementation or "sdpa", self.policy.traits.key_bias
        width = self.head_dim + (0 if key_bias is None else key_bias.extra_channels)
        try:
            return choose(OWN[name], device=query.device, dtype=query.dtype, head_dim=width).attend
        except UnsupportedError as error:
            raise ValueError(
                f"attn_implementation is {name!r}, but {error.obstacle}. Set attn_implementation to sdpa."
            ) from error


class Own(NamedTuple):
    """What a layer computes beside hidden states."""

    extension: Extension
    """Its keys and values."""

    lends: KeyValue | None
    """[s, b, g, d] before RoPE, for layers that mix them into their own; None: no layer does."""

    statistics: Statistics


class ZeroLinear(nn.Linear):
    """A linear layer whose initial weights are zeros: before training, guessed keys and values are those that
    published models begin with, and a policy's own numbers say nothing."""


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
"""Hidden states, then the fields of the layer's own `Extension`, then key and value that it lends, then its
statistics: what checkpointing can pass on."""


_NOTHING_OWN = (None,) * (len(Extension._fields) + len(KeyValue._fields))


class LCKVLlamaDecoderLayer(GradientCheckpointingLayer):
    """A layer, of which a pass of the plan may need only a part."""

    _recomputed = False

    @property  # an attribute of the base class
    def gradient_checkpointing(self) -> bool:
        """Whether the base class recomputes `forward` in backward. transformers sets it; passes without
        gradient keep nothing for backward anyway."""
        return self._recomputed and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._recomputed = value

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LCKVLlamaAttention(config, layer_idx)
        self.mlp = LCKVLlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, tokens: Tokens, part: str, *source: Tensor | None) -> _Flat:
        """`part` is "all", "keys_values" or "first_guess" (nothing else is returned), "without_source"
        (attention is left out, as if it were 0) or "wanted" (all, but hidden states of `tokens.wanted`
        alone). `source` are the fields of what the layer reads, if it reads another's, or mixes in; of each
        of two that it reads.
        Everything goes through here, so that hooks on the module (sharded or offloaded weights) see every
        use."""
        takes = _taken(source)
        if part == "keys_values":
            assert not isinstance(takes, Two), "a layer that computes keys and values takes of one other"
            return hidden_states, *_flat(self._keys_values(hidden_states, tokens, takes))
        if part == "first_guess":
            guess = self.self_attn.first_guess(hidden_states, tokens)
            return hidden_states, *_flat(Own(guess, None, ()))
        own: Own | None = None
        if part in ("all", "wanted"):
            wanted = tokens.wanted if part == "wanted" else None
            projected = self.self_attn.projected(hidden_states)
            output, own = self.self_attn(
                self.input_layernorm(hidden_states), takes, tokens, wanted, projected
            )
            if wanted is not None and self.self_attn.computes_kv:
                hidden_states = wanted.of(hidden_states)
            hidden_states = hidden_states + output
        elif self.self_attn.computes_kv:
            own = self._keys_values(hidden_states, tokens)
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, *_flat(own)

    def _keys_values(self, hidden_states: Tensor, tokens: Tokens, lent: Extension | None = None) -> "Own":
        normed, projected = self.input_layernorm(hidden_states), self.self_attn.projected(hidden_states)
        return self.self_attn.keys_values(normed, tokens, lent=lent, projected=projected)


def _taken(fields: tuple[Tensor | None, ...]) -> Extension | Two[Extension] | None:
    """What a layer takes of others, from the fields of an `Extension`, of two, or none."""
    if not fields:
        return None
    size = len(Extension._fields)
    first, *second = (Extension(*fields[at : at + size]) for at in range(0, len(fields), size))  # type: ignore[arg-type]
    return Two(first, *second) if second else first


def _flat(own: Own | None) -> _Flat:
    """What `_Flat` has behind the hidden states."""
    if own is None:
        return _NOTHING_OWN
    return *own.extension, *(own.lends or (None, None)), *own.statistics
