"""A Llama-family decoder with shared or merged keys and values, for Hugging Face's tools.

The mathematics - plan, policies, attention, rotation, caches - is that of the training model, through `lckv`; here are only its
weights under Hugging Face's names, and what `generate`, `Trainer` and `from_pretrained` expect.

Shapes: b rows, s new tokens, h query heads, g KV heads, d channels of a head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from lckv.attention.backends import choose
from lckv.attention.visibility import Visibility
from lckv.cache.base import KVCache
from lckv.models.cache import LCKVCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.tokens import counted_tokens, documents_of, positions
from lckv.policies.base import Extension, Statistics, TokenContext
from lckv.policies.build import build_policy
from lckv.rope import inverse_frequencies, rotate, rotation
from lckv.sharing.execution import PlanRunner, run_groups
from lckv.sharing.plan import layer_groups

_BACKENDS = {"eager": "reference", "sdpa": "sdpa", "flash_attention_2": "flash"}
"""Hugging Face's names of attention implementations, and those of `lckv.attention`."""


@dataclass
class LCKVOutput(ModelOutput):
    """What the model returns; fields that were not asked for are None."""

    loss: Tensor | None = None
    """float32 []: mean cross-entropy of the shifted labels in nats; in training with a policy that has one, plus `auxiliary_loss`."""
    logits: Tensor | None = None
    """[b, s, vocabulary]."""
    past_key_values: LCKVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """[b, s, hidden] of the embedding, of every layer in the pass that counts, the last one normalised."""
    last_hidden_state: Tensor | None = None
    """[b, s, hidden], normalised."""
    auxiliary_loss: Tensor | None = None
    """float32 []: the KV policy's, mean over rows."""
    merge_rates: Tensor | None = None
    """float32 [KV-computing layers, b, g]: share of tokens that were merged; None without merging or with a cache."""
    passes: int | None = None
    """Passes that were run over the iterated groups of layers."""


class Iteration(NamedTuple):
    """How often a prompt's iterated layers are run."""

    passes: int
    """At most so many."""
    converged: Callable[[Mapping[int, Extension], Mapping[int, Extension]], bool] | None = None
    """See `PlanRunner`."""


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What one forward pass knows of its tokens."""

    contexts: Mapping[int, TokenContext]
    """By layer; they differ in noise."""
    counted: Tensor | None
    cache: KVCache | None
    """Whether keys and values are wanted for a cache, and those of earlier tokens."""

    @property
    def past(self) -> KVCache | None:
        """The cache, if it holds anything."""
        return None if self.cache is None or self.cache.empty else self.cache


class LCKVLlamaAttention(nn.Module):
    """Self-attention of one layer of a sharing map. A layer that only reads keys and values has no weights for them."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        compression = config.compression_config()
        layer_types = compression.map(config.num_hidden_layers)
        layer = layer_types[layer_idx]
        self.config, self.layer_idx, self.source = config, layer_idx, layer.source
        self.computes_kv = layer_idx in layer_types.kv_layers
        self.policy = build_policy(compression.policy)
        self.visibility = Visibility(
            layer.cyclic or compression.force_nodiag, compression.sliding_window if layer.sliding else None
        )
        self.head_dim, hidden = config.head_dim, config.hidden_size
        width, kv_width = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
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
        self, hidden_states: Tensor, source: Extension | None, tokens: _Tokens
    ) -> tuple[Tensor, Extension | None, Statistics | None]:
        """Attend from [b, s, hidden] to `source`, or to the layer's own keys and values; they and their statistics are returned."""
        query = self._heads("q", hidden_states)
        own, statistics = self.keys_values(hidden_states, tokens, query) if self.computes_kv else (None, None)
        reads = own if source is None else source
        if reads is None:
            raise ValueError(f"layer {self.layer_idx} reads the keys and values of layer {self.source}, which were not given to it.")
        query = self.policy.query(query, tokens.contexts[self.layer_idx]).permute(1, 2, 0, 3)
        output = self._attend(query, reads, tokens).transpose(1, 2).flatten(2)
        return self.o_proj(output), own, statistics

    def keys_values(
        self, hidden_states: Tensor, tokens: _Tokens, query: Tensor | None = None
    ) -> tuple[Extension, Statistics | None]:
        """The layer's keys and values from [b, s, hidden]; `query` [s, b, h, d] saves projecting it where the policy reads it."""
        if query is None and self.policy.reads_query:
            query = self._heads("q", hidden_states)
        key, value, context = self._heads("k", hidden_states), self._heads("v", hidden_states), tokens.contexts[self.layer_idx]
        query = query if self.policy.reads_query else None
        if tokens.cache is not None:
            state = None if tokens.past is None else tokens.past.state(self.layer_idx)
            return self.policy.extend(state, key, value, query, context), None
        own, statistics = self.policy.keys_values(key, value, query, context)
        return Extension(*own), statistics

    def _heads(self, name: str, hidden_states: Tensor) -> Tensor:
        """Projected (and normalised) heads [s, b, heads, d], before RoPE."""
        heads = getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim))
        norm = getattr(self, f"{name}_norm", None)
        return (heads if norm is None else norm(heads)).transpose(0, 1)

    def _attend(self, query: Tensor, reads: Extension, tokens: _Tokens) -> Tensor:
        scale, biased = self.head_dim**-0.5, self.policy.biases_keys
        if tokens.past is not None:
            return tokens.past.attend(
                self.source, query, reads, tokens.counted, self.visibility, scale=scale, biased=biased
            )
        implementation = self.config._attn_implementation or "sdpa"
        backend = choose(
            _BACKENDS[implementation], device=query.device, dtype=query.dtype, head_dim=self.head_dim
        )
        visibility = replace(self.visibility, documents=tokens.contexts[self.layer_idx].documents)
        dropout = self.config.attention_dropout if self.training else 0.0
        key, value = (tensor.permute(1, 2, 0, 3) for tensor in (reads.key, reads.value))
        return backend.attend(query, key, value, visibility, scale=scale, dropout=dropout, biased=biased)


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
"""Hidden states, then the fields of the layer's own `Extension`, then its merge rate: what checkpointing can pass on."""


class LCKVLlamaDecoderLayer(nn.Module):
    """A layer, of which a pass of the plan may need only a part."""

    def __init__(self, config: LCKVLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LCKVLlamaAttention(config, layer_idx)
        self.mlp = LCKVLlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, tokens: _Tokens, part: str, *source: Tensor | None) -> _Flat:
        """`part` is "all", "keys_values" (nothing else is returned) or "without_source" (attention is left out, as if it were 0).
        `source` are the fields of what the layer reads, if it reads another's. Everything goes through here, so that hooks on the module
        (sharded or offloaded weights) see every use."""
        if part == "keys_values":
            own, statistics = self.self_attn.keys_values(self.input_layernorm(hidden_states), tokens)
            return hidden_states, *own, *(statistics or (None,))
        own_or_none: Extension | None = None
        statistics = None
        if part == "all":
            reads = Extension(*source) if source else None  # type: ignore[arg-type]
            output, own_or_none, statistics = self.self_attn(self.input_layernorm(hidden_states), reads, tokens)
            hidden_states = hidden_states + output
        elif self.self_attn.computes_kv:
            own_or_none, statistics = self.self_attn.keys_values(self.input_layernorm(hidden_states), tokens)
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, *(own_or_none or (None,) * 4), *(statistics or (None,))


class _ModelLayers:
    """The model's layers for one forward pass, as the plan calls them."""

    def __init__(self, model: "LCKVLlamaModel", tokens: _Tokens) -> None:
        self._model, self._tokens = model, tokens
        self.kept: dict[int, Extension] = {}
        """Keys and values of the pass that counts."""
        self.statistics: dict[int, Statistics] = {}
        self.hidden_states: list[Tensor] = []

    def run(
        self, index: int, hidden_states: Tensor, source: Extension | None, *, kept: bool
    ) -> tuple[Tensor, Extension | None]:
        """The whole layer, recomputed in backward where gradient checkpointing is on."""
        layer = self._model.layers[index]
        call: Callable[..., _Flat] = layer
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            call = partial(layer._gradient_checkpointing_func, layer)
        hidden_states, own, statistics = _unflat(call(hidden_states, self._tokens, "all", *(source or ())))
        if kept:
            self.hidden_states.append(hidden_states)
            if own is not None:
                self.kept[index] = own
            if statistics is not None:
                self.statistics[index] = statistics
        return hidden_states, own

    def keys_values(self, index: int, hidden_states: Tensor) -> Extension:
        """The layer's keys and values alone."""
        own = _unflat(self._model.layers[index](hidden_states, self._tokens, "keys_values"))[1]
        assert own is not None
        return own

    def run_without_source(self, index: int, hidden_states: Tensor) -> tuple[Tensor, Extension | None]:
        """Without older tokens attention to zero keys and values is exactly 0; with some, the zeros are among them."""
        if self._tokens.past is not None:
            return self.run(index, hidden_states, self.zeros(hidden_states), kept=False)
        return _unflat(self._model.layers[index](hidden_states, self._tokens, "without_source"))[:2]

    def zeros(self, hidden_states: Tensor) -> Extension:
        """Keys and values before the first pass."""
        config = self._model.config
        rows, tokens = hidden_states.shape[:2]
        zeros = hidden_states.new_zeros(tokens, rows, config.num_key_value_heads, config.head_dim)
        return Extension(zeros, zeros)


def _unflat(flat: _Flat) -> tuple[Tensor, Extension | None, Statistics | None]:
    hidden_states, key, value, joins, state, merge_rate = flat
    assert hidden_states is not None
    own = None if key is None or value is None else Extension(key, value, joins, state)
    return hidden_states, own, None if merge_rate is None else Statistics(merge_rate)


class LCKVLlamaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the classes below."""

    config_class = LCKVLlamaConfig
    config: LCKVLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LCKVLlamaDecoderLayer"]  # noqa: RUF012 transformers reads it from the class
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True


class LCKVLlamaModel(LCKVLlamaPreTrainedModel):
    """The decoder without the language-model head."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LCKVLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        compression = config.compression_config()
        self.layer_types = compression.map(config.num_hidden_layers)
        self.policy = build_policy(compression.policy)
        self.forward_passes, self.backward_passes = compression.forward_passes, compression.backward_passes
        self.groups = layer_groups(self.layer_types)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LCKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LCKVOutput:
        """`input_ids` int64 [b, s] or `inputs_embeds` [b, s, hidden]; `attention_mask` [b, older + s], 0 for padding on either side;
        `position_ids` int64 [b, s], where restarting from 0 begins another sequence in the same row."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        wants_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if wants_cache and past_key_values is None:
            past_key_values = LCKVCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, LCKVCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model keeps one entry per layer that computes keys and "
                "values: pass an LCKVCache(model.config), or None."
            )
        cache = None if past_key_values is None else past_key_values.slots
        output = self.run(
            embedded,
            cache,
            counted=counted_tokens(attention_mask, embedded.shape[1]),
            position_ids=position_ids,
            output_hidden_states=bool(output_hidden_states),
        )
        if past_key_values is not None:
            past_key_values.advance(embedded.shape[1])
            output.past_key_values = past_key_values
        return output

    def run(
        self,
        hidden_states: Tensor,
        cache: KVCache | None = None,
        *,
        counted: Tensor | None = None,
        position_ids: Tensor | None = None,
        iteration: Iteration | None = None,
        output_hidden_states: bool = False,
    ) -> LCKVOutput:
        """Run the layers on embedded tokens [b, s, hidden] with any cache, which takes them in. `counted` bool [b, s]: not padding;
        `iteration`: for maps that iterate, default the configuration's m + b passes."""
        rows, tokens = hidden_states.shape[:2]
        context = _Tokens(self._contexts(hidden_states, cache, counted, position_ids), counted, cache)
        layers = _ModelLayers(self, context)
        runner = self._runner(cache is not None and tokens == 1 and not cache.empty, iteration)
        outcome = run_groups(runner, self.groups, layers, hidden_states, {})
        last = self.norm(outcome.hidden_states)
        if cache is not None:
            cache.commit(layers.kept, counted)
        output = LCKVOutput(last_hidden_state=last, passes=outcome.passes)
        if output_hidden_states:
            output.hidden_states = (hidden_states, *layers.hidden_states[:-1], last)
        if layers.statistics:
            rates = torch.stack([layers.statistics[layer].merge_rate for layer in self.layer_types.kv_layers])
            output.merge_rates = rates.detach()
            loss = self.policy.auxiliary_loss(rates.mean((0, 2)), 1.0)
            output.auxiliary_loss = None if loss is None else loss.mean()
        return output

    def _runner(self, decodes: bool, iteration: Iteration | None) -> PlanRunner[Extension]:
        """One token sees only older ones in cyclic layers, so that a single pass is exact."""
        if decodes:
            return PlanRunner(self.layer_types, 0, 1)
        if iteration is None:
            return PlanRunner(self.layer_types, self.forward_passes, self.backward_passes)
        return PlanRunner(self.layer_types, iteration.passes - 1, 1, iteration.converged)

    def _contexts(
        self, hidden_states: Tensor, cache: KVCache | None, counted: Tensor | None, position_ids: Tensor | None
    ) -> dict[int, TokenContext]:
        rows, tokens = hidden_states.shape[:2]
        device = hidden_states.device
        older = cache is not None and not cache.empty
        if position_ids is not None:
            position_ids = position_ids.expand(rows, tokens)
        documents = None if older else documents_of(counted, position_ids)
        if position_ids is None:
            position_ids = positions(counted, cache.seen if cache is not None and older else None, rows, tokens, device)
        angles = rotation(position_ids.transpose(0, 1)[:, :, None], self._frequencies(device))
        context = TokenContext(
            partial(rotate, angles=angles),
            documents,
            None if counted is None else counted.transpose(0, 1),
            training=self.training,
        )
        contexts = dict.fromkeys(range(len(self.layers)), context)
        if self.training:
            for layer in self.layer_types.kv_layers:
                seeds = torch.randint(2**62, (rows,)).tolist()
                shape = (tokens, rows, self.config.num_key_value_heads)
                contexts[layer] = replace(context, noise=self.policy.draw_noise(shape, seeds, device))
        return contexts

    def _frequencies(self, device: torch.device) -> Tensor:
        """float32 whatever the model's dtype, and no buffer, which loading or casting the model would spoil."""
        config = self.config
        assert config.rope_parameters is not None and config.head_dim is not None
        return inverse_frequencies(
            config.head_dim, config.rope_parameters["rope_theta"], config.rope_scaling_config(), device=device
        )


class LCKVLlamaForCausalLM(LCKVLlamaPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 transformers reads it from the class

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.model = LCKVLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LCKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LCKVOutput | tuple[Any, ...]:
        """As `LCKVLlamaModel`; `labels` int64 [b, s] are shifted inside, -100 is ignored; `logits_to_keep`: of the last so many tokens,
        or of the tokens at these indices (0: all). Remaining arguments go to transformers' loss function."""
        if output_attentions:
            raise ValueError("output_attentions: attention weights are never in memory as a whole here; leave it out.")
        if labels is not None and use_cache is None:
            use_cache = False
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        assert output.last_hidden_state is not None
        output.logits = self.lm_head(output.last_hidden_state[:, kept])
        output.last_hidden_state = None
        if labels is not None:
            loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            trains = self.training and output.auxiliary_loss is not None
            output.loss = loss + output.auxiliary_loss if trains else loss
        return output if return_dict is not False else output.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """`generate` gets a cache of this model's own kind."""
        given = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; this model has a cache of its own kind, which is "
                "small already: leave it out."
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LCKVCache(self.config)
