"""The stack of layers of one pipeline stage, run by its pieces of the plan of the sharing map.

The plan is a list of steps (`lckv.sharing.plan`); `lckv.sharing.journey` says which of them a visit to a
stage runs, `lckv.sharing.execution` runs them.
"""

import re
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.profiler import record_function

from lckv.config import CompressionConfig
from lckv.pass_errors import PassErrors, PassRecord, reporting_layers
from lckv.policies.base import KeyValue, Statistics
from lckv.sharing.execution import State
from lckv.sharing.journey import Cargo, Journey, Visit
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import Step
from lckv.sharing.visiting import run_visit
from megatron_ext.model.contexts import LayerContext, Source, source_of_tensors, tensors_of_source
from megatron_ext.model.fp8 import Fp8Passes, checkpoint
from megatron_ext.model.layer import LayerOutput, SharedKVLayer
from megatron_ext.model.offloaded import OffloadedLayers
from megatron_ext.model.policy_statistics import PolicyReport, StatisticSums
from megatron_ext.model.stages import StageCall, StageKept, step_names
from megatron_ext.model.transformer_config import SharedKVTransformerConfig
from megatron_ext.parallel.context import ContextGroup
from megatron_ext.parallel.pipeline_payload import Freight, PipelinePayload
from megatron_ext.parallel.process_groups import device_of_rank

_NO_CARGO = Cargo(hidden=True, counts=False)

_WAYS = 64
"""That are kept: making one takes milliseconds."""

Contexts = dict[int, LayerContext]
"""By layer."""


class _Way(NamedTuple):
    """What a block runs with one map and one number of passes."""

    compression: CompressionConfig
    layer_types: LayerTypes
    plan: tuple[Step, ...]
    journey: Journey


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
        self.places = {layer.layer_number - 1: place for place, layer in enumerate(self.layers)}
        self.stage = self.pg_collection.pp.rank()
        self.fp8 = Fp8Passes(config, dict(zip(self.places, self.layers, strict=True)))
        self.context_group = ContextGroup(self.pg_collection.cp)
        self.statistics = StatisticSums(config, self.pg_collection.tp, self.context_group)
        self.pass_errors = PassErrors(config.compression)
        everything = len(self.layers) if recompute_num_layers is None else recompute_num_layers
        self.recomputed_layers = everything if config.recompute_granularity == "full" else 0
        self.offloaded = OffloadedLayers(config, config.offload, device_of_rank()) if config.offload else None
        self._ways: dict[CompressionConfig, _Way] = {}
        self._way: _Way | None = None
        self.has_one_map = config.compression.family(config.num_layers).only is not None
        """Whether there is no family of maps."""
        if self.has_one_map:
            self.take(config.compression)

    def take(self, compression: CompressionConfig) -> None:
        """Run the map and the passes of `compression` from now on: those of the configuration, with another
        number of passes without gradient, or with a map of its family. All stages are told the same between
        steps, when no micro-batch is on its way. No module is built or changed."""
        way = self._ways.get(compression)
        if way is None:
            while len(self._ways) >= _WAYS:
                del self._ways[next(iter(self._ways))]
            layers = self.config.num_layers
            journey = self.config.placed.journey(compression)
            way = _Way(compression, compression.map(layers), compression.plan(layers), journey)
            self._ways[compression] = way
        if way is self._way:
            return
        self._way = way
        self.statistics.layers = reporting_layers(compression, len(way.layer_types))
        for layer in self.layers:
            layer.self_attention.take(way.layer_types, compression)

    @property
    def way(self) -> "_Way":
        """What runs now."""
        if self._way is None:
            raise ValueError(
                f"the model has a family of maps, {self.config.compression.layer_types}, and none of them "
                "was chosen: call take() of the block."
            )
        return self._way

    @property
    def layer_types(self) -> LayerTypes:
        """The map that runs now."""
        return self.way.layer_types

    @property
    def plan(self) -> tuple[Step, ...]:
        """Its steps."""
        return self.way.plan

    @property
    def journey(self) -> Journey:
        """The way of a micro-batch through the pipeline stages."""
        return self.way.journey

    @property
    def visit(self) -> Visit:
        """What this stage does with a micro-batch that comes to it once."""
        (visit,) = (visit for visit in self.journey.train if visit.stage == self.stage)
        return visit

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's, whose keys expect that the layers of a stage follow each other from where Megatron
        splits equal stages; here they are numbered by their places in `layers`, as in `state_dict`."""
        whole = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        added = get_transformer_layer_offset(self.config, None, self.stage)
        layer = re.compile(rf"^{re.escape(prefix)}layers\.(-?\d+)\.")

        def renamed(key: str) -> str:
            match = layer.match(key)
            if match is None:
                return key
            return f"{prefix}layers.{self.places[int(match[1]) + added]}.{key[match.end() :]}"

        return {renamed(key): value for key, value in whole.items()}

    def payload_in(self, visit: Visit) -> PipelinePayload:
        """The tensor that `visit` gets; of the first one, which gets none, that with hidden states alone."""
        below = visit.steps[0].start if visit.steps else 0
        return self._payload(visit.receives or _NO_CARGO, below)

    def payload_out(self, visit: Visit) -> PipelinePayload:
        """The tensor that `visit` sends; of the last one, which sends none, that with hidden states alone."""
        return self._payload(visit.sends or _NO_CARGO, visit.steps[-1].stop)

    def _payload(self, cargo: Cargo, boundary: int) -> PipelinePayload:
        """`cargo` from below layer `boundary`."""
        ranks = self.pg_collection.tp.size()
        reports = cargo.counts and any(layer < boundary for layer in self.statistics.layers)
        return PipelinePayload(
            cargo=cargo,
            hidden_size=self.config.hidden_size,
            sequence_shards=ranks if self.config.sequence_parallel else 1,
            kv_heads=max(1, self.config.num_query_groups // ranks),
            head_dim=self.config.kv_channels,
            extra_channels=self.config.compression.policy.traits.extra_channels,
            sum_columns=self.statistics.columns if reports else 0,
        )

    def forward(
        self,
        hidden_states: Tensor | None,
        context: LayerContext,
        row_seeds: tuple[int, ...],
        seq_length: int,
        micro_batch_size: int,
        call: StageCall | None = None,
    ) -> tuple[Tensor, PolicyReport]:
        """Run the stage's layers, or what the visit of `call` runs of them.

        hidden_states: [s / shards, b, hidden] from the embedding where the micro-batch enters the model; else
        the input is in `call`, or what `set_input_tensor` got. `row_seeds` are those of `PolicyInputs`.
        `seq_length` are the tokens of a row that this rank has.
        Returns hidden states, normalised, where the micro-batch leaves the model, and else what the next
        visit receives; and what the KV policy did in passes that count.
        """
        call = StageCall(self.visit, self.input_tensor) if call is None else call
        visit, shape = call.visit, (seq_length, micro_batch_size)
        if self.offloaded is not None:
            self.offloaded.begin()
        arrived, sums = self._arrived(call, hidden_states, shape)
        contexts = self._contexts(context, row_seeds, shape, arrived.hidden_states.device)
        statistics: dict[int, Statistics] = {}
        names = dict(zip(visit.steps, step_names(visit.steps), strict=True))
        forked = (
            tensor_parallel.get_cuda_rng_tracker().fork() if self.config.sequence_parallel else nullcontext()
        )

        def around(step: Step) -> ExitStack:
            stack = ExitStack()
            stack.enter_context(record_function(names[step]))  # for profilers
            stack.enter_context(self.fp8.around(step))
            return stack

        with forked, self.fp8.whole():
            left = run_visit(
                self.plan,
                visit,
                _StageLayers(self, contexts, statistics),
                arrived,
                None if call.kept is None else call.kept.content,
                call.prepared,
                around,
            )
        # a pass that only prepares the next one reports nothing
        sums = self.statistics.add(sums, statistics)
        call.notes.prepared.update(left.prepared or {})
        call.notes.kept = None if left.kept is None else StageKept(left.kept, sums)
        seen = {layer: tuple(value.detach() for value in values) for layer, values in statistics.items()}
        return self._leaving(visit, left.state, sums), PolicyReport(seen, sums)

    def _arrived(
        self, call: StageCall, hidden_states: Tensor | None, shape: tuple[int, int]
    ) -> tuple[State[KeyValue], Tensor | None]:
        """What a visit begins with, and the sums of statistics of the layers below."""
        if call.visit.receives is None:
            assert hidden_states is not None
            return State(hidden_states, {}), None
        assert call.arrived is not None
        freight = self.unload(call.visit, call.arrived, *shape)
        hidden_states, sums = freight.hidden_states, freight.sums
        if call.kept is not None:
            hidden_states, sums = call.kept.content.start, call.kept.sums
        assert hidden_states is not None
        state = State(
            hidden_states,
            freight.available,
            handed=freight.handed,
            previous=freight.previous,
            lent=freight.lent,
        )
        return state, sums

    def unload(self, visit: Visit, arrived: Tensor, seq_length: int, micro_batch_size: int) -> Freight:
        """What `visit` gets, with keys and values of whole rows."""
        freight = self.payload_in(visit).unpack(arrived, seq_length, micro_batch_size)
        return freight.with_pairs(self.context_group.gather)

    def _leaving(self, visit: Visit, state: State[KeyValue], sums: Tensor | None) -> Tensor:
        """What a visit results in."""
        if visit.sends is not None:
            handed, previous = state.handed or {}, state.previous or {}
            lent = state.lent or {}
            freight = Freight(state.hidden_states, state.available, handed, previous, sums, lent)
            return self.payload_out(visit).pack(freight, self.context_group.own)
        return (
            state.hidden_states if self.final_layernorm is None else self.final_layernorm(state.hidden_states)
        )

    def _contexts(
        self, context: LayerContext, row_seeds: tuple[int, ...], shape: tuple[int, int], device: torch.device
    ) -> Contexts:
        """The context of each layer: noise is drawn once, for all passes and recomputation."""
        contexts = dict.fromkeys(self.places, context)
        whole = shape[0] * self.context_group.chunks.ranks, shape[1]
        for index in self.layer_types.kv_layers:
            if index in contexts:
                noise = self.statistics.noise(whole, row_seeds, index, device)
                contexts[index] = context.with_noise(noise, self.context_group)
        return contexts

    def layer(self, index: int) -> SharedKVLayer:
        """The layer that is number `index` of the whole model."""
        return self.layers[self.places[index]]

    @property
    def offloading(self) -> OffloadedLayers | None:
        """What runs layers now, where their activations go to the host and there will be a backward."""
        return self.offloaded if torch.is_grad_enabled() else None

    def zeros(self, hidden_states: Tensor) -> KeyValue:
        """Keys and values before the first pass."""
        payload = self._payload(_NO_CARGO, 0)
        shards = payload.sequence_shards * self.context_group.chunks.ranks
        tokens, batch = hidden_states.shape[0] * shards, hidden_states.shape[1]
        return KeyValue(
            *(hidden_states.new_zeros(shape) for shape in payload.key_value_shapes(tokens, batch))
        )

    def call(
        self, layer: SharedKVLayer, hidden_states: Tensor, source: Source | None, context: LayerContext
    ) -> LayerOutput:
        """The layer, recomputed in backward or offloaded where the configuration asks for it."""
        if (offloaded := self.offloading) is not None:
            return offloaded.run(layer, hidden_states, source, context)
        place = self.places[layer.layer_number - 1]
        if place >= self.recomputed_layers or not torch.is_grad_enabled():
            return layer(hidden_states, source, context)

        def flat(states: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
            output = layer(states, source_of_tensors(tensors), context)
            pairs = *(output.own or (None,) * 2), *(output.lends or (None,) * 2)
            return output.hidden_states, *pairs, *output.statistics

        outputs = checkpoint(
            self.config, self.pg_collection.tp, flat, hidden_states, *tensors_of_source(source)
        )
        own, lends = (None if pair[0] is None else KeyValue(*pair) for pair in (outputs[1:3], outputs[3:5]))
        return LayerOutput(outputs[0], own, tuple(outputs[5:]), lends)


class _StageLayers:
    """The stage's layers for one micro-batch, as the plan calls them."""

    def __init__(self, block: SharedKVBlock, contexts: Contexts, statistics: dict[int, Statistics]) -> None:
        """`statistics` receives those of the pass that counts."""
        self._block, self._contexts, self._statistics = block, contexts, statistics
        self._record = PassRecord(block.pass_errors, block.layer_types.cyclic_sources)
        self._lent: dict[int, KeyValue] = {}

    def run(
        self, index: int, hidden_states: Tensor, source: Source | None, *, kept: bool
    ) -> tuple[Tensor, KeyValue | None]:
        """The whole layer."""
        context, group = self._contexts[index], self._block.context_group
        output = self._block.call(self._block.layer(index), hidden_states, source, context)
        self._keep_lent(index, output.lends)
        statistics = output.statistics
        if kept and output.own is not None and not statistics:
            part = group.own(output.own)
            statistics = self._record.statistics(index, part, context.tokens.counted, group.sum)
        if kept and statistics:
            self._statistics[index] = statistics
        if not kept and output.own is not None:
            self._record.passed(index, group.own(output.own))
        return output.hidden_states, output.own

    def keys_values(self, index: int, hidden_states: Tensor) -> KeyValue:
        """The layer's keys and values alone."""
        return self._keys_values(index, hidden_states)

    def mixed_keys_values(self, index: int, hidden_states: Tensor, lent: KeyValue) -> KeyValue:
        """The same of a layer that mixes."""
        return self._keys_values(index, hidden_states, lent)

    def lent(self, index: int) -> KeyValue:
        """See `MixingLayers`."""
        return self._lent.pop(index)

    def _keys_values(self, index: int, hidden_states: Tensor, lent: KeyValue | None = None) -> KeyValue:
        layer, context = self._block.layer(index), self._contexts[index]
        if (offloaded := self._block.offloading) is not None:
            own = offloaded.keys_values(layer, hidden_states, context, lent)
            self._keep_lent(index, own.lends)
            return own.key_value
        own = layer.keys_values(hidden_states, context, lent)
        self._keep_lent(index, own.lends)
        self._record.passed(index, self._block.context_group.own(own.key_value))
        return own.key_value

    def _keep_lent(self, index: int, lends: KeyValue | None) -> None:
        if lends is not None:
            self._lent[index] = lends

    def first_guess(self, source: int, hidden_states: Tensor) -> KeyValue:
        """What is guessed of the keys and values of layer `source`, for the first pass to read."""
        guess = self._block.layer(source).first_guess(hidden_states, self._contexts[source].tokens)
        return self._block.context_group.gather(KeyValue(*self._record.guessed(source, guess)))

    def run_without_source(self, index: int, hidden_states: Tensor) -> tuple[Tensor, KeyValue | None]:
        """Zero keys and values make attention exactly 0, so it is left out."""
        own = self.keys_values(index, hidden_states) if index in self._block.layer_types.kv_layers else None
        layer = self._block.layer(index)
        if (offloaded := self._block.offloading) is not None:
            return offloaded.feed_forward(layer, hidden_states), own
        return layer.feed_forward(hidden_states), own

    def zeros(self, hidden_states: Tensor) -> KeyValue:
        """Keys and values before the first pass."""
        return self._block.zeros(hidden_states)
