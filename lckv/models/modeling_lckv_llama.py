"""A Llama-family decoder with shared or merged keys and values, for Hugging Face's tools.

The mathematics - plan, policies, attention, rotation, caches - is that of the training model, through `lckv`;
here is only what `generate`, `Trainer` and `from_pretrained` expect.

Shapes: b rows, s new tokens, g KV heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.generation import GenerationMode

from lckv.cache.base import KVCache
from lckv.models.arguments import (
    OF_LOSS,
    check_cache_position,
    check_embedded,
    check_tokens,
    chosen_states,
    read_arguments,
)
from lckv.models.cache import CACHE_NAME, CACHE_NAMES, LCKVCache, given_cache
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.interface import (
    AttentionFunction,
    attention_function,
    check_no_cache,
    mask_for,
    obstacle_to_functions,
)
from lckv.models.layers import LCKVLlamaAttention, LCKVLlamaDecoderLayer, Tokens, ZeroLinear
from lckv.models.logits import (
    check_labels,
    check_skip_logits,
    check_targets,
    kept_states,
    loss_without_logits,
    share_of_batch,
)
from lckv.models.outputs import LCKVModelOutput, LCKVOutput, RunOutput
from lckv.models.planned_layers import HiddenStates, PlannedLayers
from lckv.models.tokens import Given, Layout, documents_of, positions
from lckv.models.wanted import Wanted, check_needs, newest_columns, results_of
from lckv.pass_errors import PassErrors, PassRecord, reporter_of, reporting_layers
from lckv.policies.base import Extension, Statistics, TokenContext, statistics_by_name
from lckv.rope import Turn
from lckv.sharing.early_exit import exit_early
from lckv.sharing.execution import State, run_steps
from lckv.sharing.mixing import initial_weight
from lckv.sharing.plan import Step, iteration_plan


class Iteration(NamedTuple):
    """How often a prompt's iterated layers are run."""

    passes: int
    """At most so many."""
    converged: Callable[[Mapping[int, Extension], Mapping[int, Extension]], bool] | None = None
    """See `run_steps`."""
    first_guess: bool = True
    """Whether the first pass reads the learned first guess, where the model has one; else zeros."""


class LCKVLlamaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the classes below."""

    config_class = LCKVLlamaConfig
    config: LCKVLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LCKVLlamaDecoderLayer"]  # noqa: RUF012 - transformers reads it
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012 - transformers reads it
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    """There are such models; those that no function of others can serve say so when they are made."""

    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers, of weights that are not loaded."""
        if isinstance(module, ZeroLinear):
            initialization.zeros_(module.weight)
            if module.bias is not None:
                initialization.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, LCKVLlamaAttention) and module.mixes is not None:
            for weight in (module.key_weight, module.value_weight):
                initialization.copy_(weight, initial_weight(module.mix_scaling_factor).to(weight))


class LCKVLlamaModel(LCKVLlamaPreTrainedModel):
    """The decoder without the language-model head."""

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.function_obstacle = obstacle_to_functions(config)
        attention_function(config, self.function_obstacle)  # says at once what it cannot serve
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [LCKVLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        compression = config.compression_config()
        self.layer_types = compression.map(config.num_hidden_layers)
        self.policy = compression.policy.build()
        self.first_guess = compression.first_guess
        self.pass_errors, self.reporter = PassErrors(compression), reporter_of(compression)
        self.reporting_layers = reporting_layers(compression, config.num_hidden_layers)
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
        output_hidden_states: bool | int | list[int] | None = None,
        states_to_keep: int = 0,
        cache: LCKVCache | None = None,
        **kwargs: Any,
    ) -> LCKVModelOutput | tuple[Any, ...]:
        """`input_ids` int64 [b, s] or `inputs_embeds` [b, s, hidden]; `attention_mask` [b, older + s], 0 for
        padding, which a dense model may have anywhere, also where its cache holds tokens; `position_ids`
        int64 [b, s], default the tokens' columns, where restarting from 0 begins another sequence in the
        same row; `output_hidden_states`: all, or those at an index or list of them; `states_to_keep`: columns
        at the end that `last_hidden_state` is wanted of, 0 for all. In evaluation layers above all keys and
        values run for these alone. `cache` is `past_key_values`, as transformers calls it from 5.24 on.
        Further arguments: `lckv.models.arguments`.

        Raises ValueError for what contradicts the cache, the sharing map or the KV policy, and TypeError for
        an argument of another name."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        cache = given_cache(cache, past_key_values)
        function = attention_function(self.config, self.function_obstacle)
        asked = read_arguments(kwargs, self.config, attention_function=function)
        embedded = self.embed_tokens(check_tokens(input_ids)) if inputs_embeds is None else inputs_embeds
        check_embedded(embedded, self.config.hidden_size)
        if function is not None:
            check_no_cache(function, use_cache, cache)
            use_cache = False
        cache = self._cache(cache, use_cache)
        slots = None if cache is None else cache.slots
        older, tokens = 0 if slots is None else slots.columns, embedded.shape[1]
        check_cache_position(asked.cache_position, older, tokens)
        given = Given(attention_mask, position_ids, asked.packing)
        layout, mask = Layout(), None
        if function is None:
            layout = given.layout(embedded, slots, self.policy, training=self.training)
        else:
            given = given.for_function()
        position_ids = given.positions(embedded, layout.counted, slots)
        if function is not None:
            mask = mask_for(self.config, embedded, attention_mask, position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        whole = self.training or function or chosen_states(output_hidden_states, len(self.layers) + 1)
        output = self.run(
            embedded,
            None if slots is None else slots.under(layout.shown),
            layout=layout,
            position_ids=position_ids,
            output_hidden_states=output_hidden_states,
            function=None if function is None else AttentionFunction(function, mask, asked.of_attention),
            wanted=None if whole else newest_columns(embedded, states_to_keep),
        )
        result = LCKVModelOutput(
            kept_states(output.last_hidden_state, states_to_keep, "states_to_keep"),
            cache,
            output.hidden_states,
            auxiliary_loss=output.auxiliary_loss,
            statistics=output.statistics,
        )
        return result if asked.return_dict else result.to_tuple()

    def _cache(self, given: LCKVCache | None, use_cache: bool | None) -> LCKVCache | None:
        """The cache to read and to fill, if any."""
        if given is not None and not isinstance(given, LCKVCache):
            raise ValueError(
                f"{CACHE_NAME} is a {type(given).__name__}; this model keeps one entry per layer that "
                "computes keys and values: pass an LCKVCache(model.config), or None."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if given is None and not use_cache:
            return None
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                f"use_cache is set, or {CACHE_NAME} given, in training; what is in a cache has no "
                "gradient, and a KV policy decides without noise there: leave them out, or call model.eval()."
            )
        if given is None:
            return LCKVCache(self.config)
        given.check_fits(self.config)
        return given

    def run(
        self,
        hidden_states: Tensor,
        cache: KVCache | None = None,
        *,
        counted: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        iteration: Iteration | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        function: AttentionFunction | None = None,
        wanted: Tensor | None = None,
    ) -> RunOutput:
        """Run the layers on embedded tokens [b, s, hidden] with any cache, which takes them in. `counted`
        bool [b, s]: not padding, or `layout`: all that there is to say of it; `iteration`: for maps that
        iterate, default the configuration's m + b passes; `function`: of others, for attention; `wanted`
        int64 [b, q]: the columns that `last_hidden_state` [b, q, hidden] is wanted of, in evaluation (None:
        all); layers above all keys and values run for these alone, and where q is 0 not at all.

        Raises ValueError where rows of the batch and of the cache differ, and for what needs all tokens."""
        rows, tokens = hidden_states.shape[:2]
        if cache is not None and not cache.empty and len(cache.seen) != rows:
            raise ValueError(
                f"the batch has {rows} rows, but its cache holds {len(cache.seen)}; a row of the cache goes "
                "with each."
            )
        if layout is None:
            begins = None if position_ids is None or (cache and not cache.empty) else position_ids == 0
            layout = Layout(counted, None if cache and not cache.empty else documents_of(counted, begins))
        contexts = self._contexts(hidden_states, cache, layout, position_ids)
        chosen = chosen_states(output_hidden_states, len(self.layers) + 1)
        states = HiddenStates(chosen, hidden_states)
        of_results = None
        if wanted is not None:
            check_needs(wanted, all_tokens=bool(chosen) or function is not None)
            of_results = Wanted.at(wanted, tokens, contexts[0], layout)
        context = Tokens(contexts, layout, cache, function, of_results)
        record = PassRecord(self.pass_errors, self.layer_types.cyclic_sources)
        layers = PlannedLayers(self.layers, context, states, record)  # type: ignore[arg-type]  # a ModuleList is one
        steps = exit_early(self._steps(tokens, iteration), results_of(wanted))
        converged = None if iteration is None else iteration.converged
        state = run_steps(steps, layers, State(hidden_states, {}), converged)
        hidden_states = state.hidden_states if wanted is None else state.hidden_states[:, : wanted.shape[1]]
        last = self.norm(hidden_states)
        if cache is not None:
            cache.commit(layers.kept, layout.counted)
        auxiliary_loss, by_name = None, None
        if layers.statistics:
            auxiliary_loss, by_name = self._report(layers.statistics, layout.counted)
        return RunOutput(last, states.all(last) if chosen else None, auxiliary_loss, by_name, state.passes)

    def _report(
        self, statistics: Mapping[int, Statistics], counted: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The auxiliary loss, the mean of rows with tokens, and what the KV policy, or errors between passes,
        say of the statistics of each layer that reports. `counted` bool [b, s]; None: all."""
        of_layers = [statistics[layer] for layer in self.reporting_layers]
        # Of each statistic [layers, b, g].
        stacked = [torch.stack(tensors) for tensors in zip(*of_layers, strict=True)]
        by_name = dict(statistics_by_name(self.reporter, [tensor.detach() for tensor in stacked]))
        loss = self.reporter.auxiliary_loss([tensor.mean((0, 2)) for tensor in stacked], 1.0)
        if loss is not None and counted is not None:  # rows of padding have nothing that could be too little
            there = counted.any(1)
            return (loss * there).sum() / there.sum().clamp(min=1), by_name
        return None if loss is None else loss.mean(), by_name

    def iterates(self, tokens: int) -> bool:
        """Whether layers run more than once over so many new tokens. One token sees only older ones in cyclic
        layers, so that a single pass is exact."""
        return tokens > 1 and self.layer_types.any_cyclic

    def _steps(self, tokens: int, iteration: Iteration | None) -> tuple[Step, ...]:
        if not self.iterates(tokens):
            return self.single_pass
        if iteration is None:
            return self.steps
        guesses = self.first_guess and iteration.first_guess
        return iteration_plan(self.layer_types, iteration.passes - 1, 1, first_guess=guesses)

    def _contexts(
        self,
        hidden_states: Tensor,
        cache: KVCache | None,
        layout: Layout,
        position_ids: Tensor | None,
    ) -> dict[int, TokenContext]:
        rows, tokens = hidden_states.shape[:2]
        device = hidden_states.device
        if position_ids is None:
            seen = None if cache is None or cache.empty else cache.seen
            position_ids = positions(layout.counted, seen, rows, tokens, device)
        position_ids = position_ids.expand(rows, tokens)
        # Its frequencies are float32 whatever the model's dtype, and no buffer, which loading or casting the
        # model would spoil.
        rope = self.config.rotary_embedding()
        length = None if cache is None else cache.rope_length
        angles = rope.rotation(position_ids.transpose(0, 1)[:, :, None], length)
        context = TokenContext(
            Turn(angles),
            layout.documents,
            None if layout.counted is None else layout.counted.transpose(0, 1),
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


class LCKVLlamaForCausalLM(LCKVLlamaPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head.

    Maps with cyclic layers (layers that read others above them) give slightly other logits with a cache than
    without: see docs/huggingface.md of the project.

    There are no schedules here: in training, a KV policy that has stages is at the end of its stage (a fading
    channel is gone, the whole compression ratio is asked for). Its randomness follows torch's CPU generator.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers reads it
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012

    def __init__(self, config: LCKVLlamaConfig) -> None:
        super().__init__(config)
        self.model = LCKVLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # The head is split with the decoder, or not at all.
        if config.base_model_tp_plan is None:
            self._tp_plan = {}
        if config.base_model_pp_plan is None:
            self._pp_plan = {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LCKVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        cache: LCKVCache | None = None,
        **kwargs: Any,
    ) -> LCKVOutput | tuple[Any, ...]:
        """As `LCKVLlamaModel`; `labels` int64 [b, s] are shifted inside, -100 is ignored; `logits_to_keep`:
        see `kept_states`; `skip_logits`: only the loss is made of labels, without logits of all tokens in
        memory. `num_items_in_batch`, `ignore_index` and `shift_labels` are those of transformers'
        loss function."""
        given_to_loss = {name: kwargs.pop(name, None) for name in OF_LOSS}
        of_loss = {name: value for name, value in given_to_loss.items() if value is not None}
        check_labels(labels, of_loss)
        check_skip_logits(skip_logits, labels, self.lm_head, self.config.vocab_size)
        cache = given_cache(cache, past_key_values)
        if labels is not None and use_cache is None and cache is None:
            use_cache = False
        return_dict = kwargs.pop("return_dict", None)
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            return_dict=True,
            states_to_keep=max(0, logits_to_keep) if isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        states = kept_states(output.last_hidden_state, logits_to_keep)
        logits = None if skip_logits else self.lm_head(states)
        loss = None
        if labels is not None:
            check_targets(labels, of_loss, states)
            if logits is None:
                loss = loss_without_logits(states, self.lm_head, labels, **of_loss)
            else:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss
                )
            if self.training and output.auxiliary_loss is not None:
                loss = loss + output.auxiliary_loss * share_of_batch(labels, **of_loss)
        result = LCKVOutput(
            loss,
            logits,
            getattr(output, CACHE_NAME),
            output.hidden_states,
            auxiliary_loss=output.auxiliary_loss,
            statistics=output.statistics,
        )
        return (
            result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching (`generate_batch`) keeps a cache of its own: refused."""
        raise ValueError(
            "transformers' continuous batching (generate_batch) does not read this model's cache; the engine "
            "of this project has continuous batching with paged slots: lckv.generation.engine.Engine, or "
            "`lckv-megatron serve`."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

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
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit is {generation_config.assistant_early_exit}; the first layers alone "
                "are no model with this one's sharing map and cache: leave it out, or give assistant_model "
                "or prompt_lookup_num_tokens."
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
        given = given_cache(*(model_kwargs.pop(name, None) for name in CACHE_NAMES))
        if given is None and generation_config.use_cache is not False:
            given = LCKVCache(self.config)
        if given is not None:
            model_kwargs[CACHE_NAME] = given
