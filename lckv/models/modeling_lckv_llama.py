"""A Llama-family decoder with shared or merged keys and values, for Hugging Face's tools.

The mathematics - plan, policies, attention, rotation, caches - is that of the training model, through `lckv`;
here is only what `generate`, `Trainer` and `from_pretrained` expect.

Shapes: b rows, s new tokens, g KV heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import ModelOutput

from lckv.cache.base import KVCache
from lckv.models.cache import LCKVCache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.layers import LCKVLlamaDecoderLayer, PlannedLayers, Tokens
from lckv.models.tokens import counted_tokens, documents_of, positions
from lckv.policies.base import Extension, TokenContext, statistics_by_name
from lckv.rope import inverse_frequencies, rotate, rotation
from lckv.sharing.execution import State, run_steps
from lckv.sharing.plan import Step, iteration_plan


@dataclass
class LCKVOutput(ModelOutput):
    """What the model returns; fields that were not asked for are None."""

    loss: Tensor | None = None
    """float32 []: mean cross-entropy of the shifted labels in nats;
    in training with a policy that has one, plus `auxiliary_loss`."""
    logits: Tensor | None = None
    """[b, s, vocabulary]."""
    past_key_values: LCKVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """[b, s, hidden] of the embedding, of every layer in the pass that counts, the last one normalised."""
    last_hidden_state: Tensor | None = None
    """[b, s, hidden], normalised."""
    auxiliary_loss: Tensor | None = None
    """float32 []: the KV policy's, mean over rows."""
    statistics: dict[str, Tensor] | None = None
    """What the KV policy reports, by name: each float32 [layers that compute keys and values, b, g]. None
    where it reports nothing, and with a cache."""
    passes: int | None = None
    """Passes that were run over the iterated groups of layers."""


class Iteration(NamedTuple):
    """How often a prompt's iterated layers are run."""

    passes: int
    """At most so many."""
    converged: Callable[[Mapping[int, Extension], Mapping[int, Extension]], bool] | None = None
    """See `run_steps`."""


class LCKVLlamaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the classes below."""

    config_class = LCKVLlamaConfig
    config: LCKVLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LCKVLlamaDecoderLayer"]  # noqa: RUF012 - transformers reads it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers reads it
    _supports_flash_attn = True
    _supports_sdpa = True


class LCKVLlamaModel(LCKVLlamaPreTrainedModel):
    """The decoder without the language-model head."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [LCKVLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        compression = config.compression_config()
        self.layer_types = compression.map(config.num_hidden_layers)
        self.policy = compression.policy.build()
        self.forward_passes, self.backward_passes = compression.forward_passes, compression.backward_passes
        self.steps = compression.plan(config.num_hidden_layers)
        self.single_pass = iteration_plan(self.layer_types, 0, 1)
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
        """`input_ids` int64 [b, s] or `inputs_embeds` [b, s, hidden]; `attention_mask` [b, older + s], 0 for
        padding on either side; `position_ids` int64 [b, s], where restarting from 0 begins another sequence
        in the same row."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = self._cache(past_key_values, use_cache)
        older, tokens = 0 if past_key_values is None else past_key_values.get_seq_length(), embedded.shape[1]
        output = self.run(
            embedded,
            None if past_key_values is None else past_key_values.slots,
            counted=counted_tokens(attention_mask, tokens, older),
            position_ids=position_ids,
            output_hidden_states=bool(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        )
        if past_key_values is not None:
            past_key_values.advance(tokens)
            output.past_key_values = past_key_values
        return output

    def _cache(self, given: LCKVCache | None, use_cache: bool | None) -> LCKVCache | None:
        """The cache to read and to fill, if any."""
        if given is not None and not isinstance(given, LCKVCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}; this model keeps one entry per layer that "
                "computes keys and values: pass an LCKVCache(model.config), or None."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if given is None and not use_cache:
            return None
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "use_cache is set, or past_key_values given, in training; what is in a cache has no "
                "gradient, and a KV policy decides without noise there: leave them out, or call model.eval()."
            )
        return LCKVCache(self.config) if given is None else given

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
        """Run the layers on embedded tokens [b, s, hidden] with any cache, which takes them in. `counted`
        bool [b, s]: not padding; `iteration`: for maps that iterate,
        default the configuration's m + b passes."""
        rows, tokens = hidden_states.shape[:2]
        if cache is not None and not cache.empty and len(cache.seen) != rows:
            raise ValueError(
                f"the batch has {rows} rows, but its cache holds {len(cache.seen)}; a row of the cache goes "
                "with each."
            )
        context = Tokens(self._contexts(hidden_states, cache, counted, position_ids), counted, cache)
        states = [hidden_states] if output_hidden_states else None
        layers = PlannedLayers(self.layers, context, states)  # type: ignore[arg-type]  # a ModuleList is one
        steps = self._steps(tokens, iteration)
        converged = None if iteration is None else iteration.converged
        state = run_steps(steps, layers, State(hidden_states, {}), converged)
        last = self.norm(state.hidden_states)
        if cache is not None:
            cache.commit(layers.kept, counted)
        output = LCKVOutput(last_hidden_state=last, passes=state.passes)
        if states is not None:
            output.hidden_states = (*states[:-1], last)
        if layers.statistics:
            of_layers = [layers.statistics[layer] for layer in self.layer_types.kv_layers]
            # Of each statistic [KV layers, b, g].
            statistics = [torch.stack(tensors) for tensors in zip(*of_layers, strict=True)]
            output.statistics = dict(
                statistics_by_name(self.policy, [tensor.detach() for tensor in statistics])
            )
            loss = self.policy.auxiliary_loss([tensor.mean((0, 2)) for tensor in statistics], 1.0)
            output.auxiliary_loss = None if loss is None else loss.mean()
        return output

    def iterates(self, tokens: int) -> bool:
        """Whether layers run more than once over so many new tokens. One token sees only older ones in cyclic
        layers, so that a single pass is exact."""
        return tokens > 1 and self.layer_types.any_cyclic

    def _steps(self, tokens: int, iteration: Iteration | None) -> tuple[Step, ...]:
        if not self.iterates(tokens):
            return self.single_pass
        if iteration is None:
            return self.steps
        return iteration_plan(self.layer_types, iteration.passes - 1, 1)

    def _contexts(
        self,
        hidden_states: Tensor,
        cache: KVCache | None,
        counted: Tensor | None,
        position_ids: Tensor | None,
    ) -> dict[int, TokenContext]:
        rows, tokens = hidden_states.shape[:2]
        device = hidden_states.device
        older = cache is not None and not cache.empty
        if position_ids is not None:
            position_ids = position_ids.expand(rows, tokens)
        documents = None if older else documents_of(counted, position_ids)
        if position_ids is None:
            position_ids = positions(
                counted, cache.seen if cache is not None and older else None, rows, tokens, device
            )
        angles = rotation(position_ids.transpose(0, 1)[:, :, None], self._frequencies(device))
        context = TokenContext(
            partial(rotate, angles=angles),
            documents,
            None if counted is None else counted.transpose(0, 1),
            training=self.training,
            positions=position_ids.transpose(0, 1),
        )
        contexts = dict.fromkeys(range(len(self.layers)), context)
        if self.training:
            for layer in self.layer_types.kv_layers:
                seeds = torch.randint(2**62, (rows,)).tolist()
                shape = (tokens, rows, self.config.num_key_value_heads)
                contexts[layer] = replace(context, noise=self.policy.draw_noise(shape, seeds, device))
        return contexts

    def _frequencies(self, device: torch.device) -> Tensor:
        """float32 whatever the model's dtype, and no buffer,
        which loading or casting the model would spoil."""
        config = self.config
        assert config.rope_parameters is not None and config.head_dim is not None
        return inverse_frequencies(
            config.head_dim, config.rope_parameters["rope_theta"], config.rope_scaling_config(), device=device
        )


class LCKVLlamaForCausalLM(LCKVLlamaPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head.

    There are no schedules here: in training, a KV policy that has stages is at the end of its stage (a fading
    channel is gone, the whole compression ratio is asked for). Its randomness follows torch's CPU generator.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers reads it

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
        """As `LCKVLlamaModel`; `labels` int64 [b, s] are shifted inside, -100 is ignored; `logits_to_keep`:
        of the last so many tokens, or of the tokens at these indices (0: all). Remaining arguments go to
        transformers' loss function."""
        if output_attentions:
            raise ValueError(
                "output_attentions: attention weights are never in memory as a whole here; leave it out."
            )
        if labels is not None and use_cache is None and past_key_values is None:
            use_cache = False
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if self.training and output.auxiliary_loss is not None:
                loss = loss + output.auxiliary_loss * _share(labels, **kwargs)
        result = LCKVOutput(
            loss,
            logits,
            output.past_key_values,
            output.hidden_states,
            auxiliary_loss=output.auxiliary_loss,
            statistics=output.statistics,
        )
        return (
            result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
        )

    def _prepare_cache_for_generation(  # type: ignore[override]  # what it is given besides differs between versions
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """`generate` gets a cache of this model's own kind."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; this model has a cache "
                "of its own kind, which is small already: leave it out."
            )
        if (
            generation_mode == GenerationMode.ASSISTED_GENERATION
            and not self.model.policy.traits.keeps_every_token
        ):
            raise ValueError(
                "assisted decoding forgets the tokens that it rejects, which is impossible with the policy "
                f"{self.model.policy.name} (compression.policy), since it does not keep every token in a "
                "slot of its own: leave out assistant_model and prompt_lookup_num_tokens."
            )
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LCKVCache(self.config)


def _share(labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Tensor | float:
    """Share of this micro-batch in its batch: transformers' `Trainer` adds up the losses of micro-batches,
    and `num_items_in_batch` is the number of targets in all of them. 1 where it is not given."""
    if num_items_in_batch is None:
        return 1.0
    targets = kwargs.get("shift_labels")
    return ((labels[:, 1:] if targets is None else targets) != -100).sum() / num_items_in_batch
