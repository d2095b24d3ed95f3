"""The stack of layers of one pipeline stage, run by its piece of the plan of the sharing map.

The plan is a list of steps (`lckv.sharing.plan`); `lckv.sharing.execution` runs it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.profiler import record_function

from lckv.policies.base import KeyValue, Statistics, TokenContext
from lckv.sharing.execution import State, run_steps
from lckv.sharing.plan import Step, crossing_sources, cut
from megatron_ext.errors import ConfigError
from megatron_ext.model.fp8 import Fp8Passes, checkpoint
from megatron_ext.model.layer import LayerOutput, SharedKVLayer
from megatron_ext.model.policy_statistics import PolicyReport, StatisticSums
from megatron_ext.model.transformer_config import SharedKVTransformerConfig
from megatron_ext.parallel.pipeline_payload import PipelinePayload

KeyValues = dict[int, KeyValue]
"""Keys and values by the layer that computed them."""

Contexts = dict[int, TokenContext]
"""What the KV policy knows of the tokens, by layer."""


class SharedKVBlock(TransformerBlock):
    """Megatron's TransformerBlock whose forward runs the plan."""

    def __init__(
        self,
        config: SharedKVTransformerConfig,
        spec: ModuleSpec,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        recompute_num_layers: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            spec=spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
        )
        self.layer_types = config.layer_types
        self.first_layer = self.layers[0].layer_number - 1
        self.end_layer = self.first_layer + len(self.layers)
        self.plan = config.compression.plan(len(self.layer_types))
        self.steps = self._steps_of_stage()
        self.step_names = _names(self.steps)
        self.fp8 = Fp8Passes(config, list(self.layers), self.first_layer)
        self.statistics = StatisticSums(config, config.compression.policy.build(), self.pg_collection.tp)
        self.payload_in = self._payload(self.first_layer)
        self.payload_out = self._payload(self.end_layer)
        everything = len(self.layers) if recompute_num_layers is None else recompute_num_layers
        self.recomputed_layers = everything if config.recompute_granularity == "full" else 0

    def _steps_of_stage(self) -> tuple[Step, ...]:
        steps = cut(self.plan, range(self.first_layer, self.end_layer))
        for step in steps:
            if step.group.iterated and not (step.begins and step.ends):
                raise ConfigError(
                    f"compression.layer_types {self.layer_types} iterates layers {step.group.start} to "
                    f"{step.group.stop - 1} together, but parallel.pipeline_model_parallel_size "
                    f"{self.config.pipeline_model_parallel_size} splits them over stages."
                )
        return steps

    def _payload(self, boundary: int) -> PipelinePayload:
        ranks = self.pg_collection.tp.size()
        return PipelinePayload(
            sources=crossing_sources(self.plan, boundary),
            hidden_size=self.config.hidden_size,
            sequence_shards=ranks if self.config.sequence_parallel else 1,
            kv_heads=max(1, self.config.num_query_groups // ranks),
            head_dim=self.config.kv_channels,
            extra_channels=self.config.compression.policy.traits.extra_channels,
            sum_columns=self.statistics.columns if self._statistics_below(boundary) else 0,
        )

    def _statistics_below(self, boundary: int) -> bool:
        return any(layer < boundary for layer in self.layer_types.kv_layers)

    def forward(
        self,
        hidden_states: Tensor | None,
        context: TokenContext,
        row_seeds: tuple[int, ...],
        seq_length: int,
        micro_batch_size: int,
    ) -> tuple[Tensor, PolicyReport]:
        """Run the stage's layers.

        hidden_states: [s / shards, b, hidden] from the embedding; on a later stage None, the input is what
        `set_input_tensor` got. `row_seeds` are those of `PolicyInputs`. Returns normalised hidden states on
        the last stage and the next stage's input on others, and what the KV policy did in the last pass.
        """
        available: KeyValues = {}
        sums = None
        if not self.pre_process:
            hidden_states, available, sums = self.payload_in.unpack(
                self.input_tensor, seq_length, micro_batch_size
            )
        assert hidden_states is not None
        contexts = self._contexts(context, row_seeds, (seq_length, micro_batch_size), hidden_states.device)
        statistics: dict[int, Statistics] = {}
        forked = (
            tensor_parallel.get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext()
        )
        with forked, self.fp8.whole():
            layers = _StageLayers(self, contexts, statistics)
            state = State(hidden_states, available)
            for step, name in zip(self.steps, self.step_names, strict=True):
                with record_function(name), self.fp8.around(step):  # names are for profilers
                    state = run_steps((step,), layers, state)
        hidden_states = state.hidden_states
        sums = self.statistics.add(sums, statistics)
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
        if not self.post_process:
            hidden_states = self.payload_out.pack(hidden_states, state.available, sums)
        seen = {layer: tuple(value.detach() for value in values) for layer, values in statistics.items()}
        return hidden_states, PolicyReport(seen, sums)

    def _contexts(
        self, context: TokenContext, row_seeds: tuple[int, ...], shape: tuple[int, int], device: torch.device
    ) -> Contexts:
        """The context of each layer: noise is drawn once, for all passes and recomputation."""
        contexts = dict.fromkeys(range(self.first_layer, self.end_layer), context)
        for index in self.layer_types.kv_layers:
            if index in contexts:
                noise = self.statistics.noise(shape, row_seeds, index, device)
                contexts[index] = replace(context, noise=noise)
        return contexts

    def layer(self, index: int) -> SharedKVLayer:
        """The layer that is number `index` of the whole model."""
        return self.layers[index - self.first_layer]

    def zeros(self, hidden_states: Tensor) -> KeyValue:
        """Keys and values before the first pass."""
        tokens, batch = hidden_states.shape[0] * self.payload_in.sequence_shards, hidden_states.shape[1]
        return KeyValue(
            *(hidden_states.new_zeros(shape) for shape in self.payload_in.key_value_shapes(tokens, batch))
        )

    def call(
        self, layer: SharedKVLayer, hidden_states: Tensor, source: KeyValue | None, context: TokenContext
    ) -> LayerOutput:
        """The layer, recomputed in backward where the configuration asks for it."""
        if layer.layer_number - 1 - self.first_layer >= self.recomputed_layers or not torch.is_grad_enabled():
            return layer(hidden_states, source, context)

        def flat(states: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor | None, ...]:
            output = layer(states, None if key is None or value is None else KeyValue(key, value), context)
            return output.hidden_states, *(output.own or (None,) * 2), *output.statistics

        outputs = checkpoint(
            self.config, self.pg_collection.tp, flat, hidden_states, *(source or (None,) * 2)
        )
        own = None if outputs[1] is None else KeyValue(*outputs[1:3])
        return LayerOutput(outputs[0], own, tuple(outputs[3:]))


def _names(steps: Sequence[Step]) -> list[str]:
    """Of each step, such as "group 1 pass 0 without gradient": the groups of the stage count from 0."""
    groups = list(dict.fromkeys(step.group for step in steps))
    return [
        f"group {groups.index(step.group)} pass {step.number}"
        + ("" if step.requires_grad else " without gradient")
        for step in steps
    ]


class _StageLayers:
    """The stage's layers for one micro-batch, as the plan calls them."""

    def __init__(self, block: SharedKVBlock, contexts: Contexts, statistics: dict[int, Statistics]) -> None:
        """`statistics` receives those of the pass that counts."""
        self._block, self._contexts, self._statistics = block, contexts, statistics

    def run(
        self, index: int, hidden_states: Tensor, source: KeyValue | None, *, kept: bool
    ) -> tuple[Tensor, KeyValue | None]:
        """The whole layer."""
        output = self._block.call(self._block.layer(index), hidden_states, source, self._contexts[index])
        if kept and output.statistics:
            self._statistics[index] = output.statistics
        return output.hidden_states, output.own

    def keys_values(self, index: int, hidden_states: Tensor) -> KeyValue:
        """The layer's keys and values alone."""
        return self._block.layer(index).keys_values(hidden_states, self._contexts[index])[0]

    def run_without_source(self, index: int, hidden_states: Tensor) -> tuple[Tensor, KeyValue | None]:
        """Zero keys and values make attention exactly 0, so it is left out."""
        own = self.keys_values(index, hidden_states) if index in self._block.layer_types.kv_layers else None
        return self._block.layer(index).feed_forward(hidden_states), own

    def zeros(self, hidden_states: Tensor) -> KeyValue:
        """Keys and values before the first pass."""
        return self._block.zeros(hidden_states)
