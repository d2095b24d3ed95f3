"""The sizes of a run, computed from its settings. Neither torch nor Megatron is loaded."""

import math
from dataclasses import dataclass, replace

from lckv.cost import (
    ModelShape,
    PromptCost,
    TrainingCost,
    kv_bytes_per_token,
    prompt_cost,
    reading_cost,
    training_cost,
)
from lckv.sharing.family import LayerTypesFamily
from lckv.sharing.layer_types import LayerTypes
from megatron_ext.config import RunConfig
from megatron_ext.model.cost import model_shape
from megatron_ext.model.parameters import padded_vocab_size, stage_parameters, total_parameters
from megatron_ext.model.placement import place


@dataclass(frozen=True)
class TeacherSizes:
    """The model that a run learns from."""

    parameters: int
    """Of the whole model."""

    precision: str
    """Of its weights."""

    flops: float
    """Of its forward, per token."""

    @classmethod
    def of(cls, teacher: RunConfig, *, vocab_size: int, seq_length: int) -> "TeacherSizes":
        """Of the run that has made it, with the layout of now; `vocab_size` without padding, `seq_length`
        tokens in a row of the student's."""
        model, compression, parallel = teacher.model, teacher.compression, teacher.parallel
        padded = padded_vocab_size(vocab_size, model, parallel)
        placement = place(model, compression, parallel, vocab_size=vocab_size, seq_length=seq_length)
        stages = stage_parameters(model, compression, parallel, placement, vocab_size=vocab_size)
        shape = model_shape(model, vocab_size=padded, seq_length=seq_length)
        return cls(
            total_parameters(stages, parallel), teacher.train.precision, reading_cost(shape, compression)
        )


@dataclass(frozen=True)
class RunSizes:
    """A run whose settings fit together, on so many processes."""

    run: RunConfig
    shape: ModelShape
    world_size: int
    parameters: int
    """Of the whole model."""

    teacher: TeacherSizes | None = None
    """None: there is none, or it is not known here."""

    @property
    def family(self) -> LayerTypesFamily:
        """The sharing map, or the family of maps."""
        return self.run.compression.family(self.shape.num_layers)

    @property
    def layer_types(self) -> LayerTypes:
        """The sharing map; of a family its first one, of which the cache and prompts are told."""
        return self.family.first

    @property
    def kv_bytes(self) -> int:
        """KV cache of one token in 16 bits."""
        return kv_bytes_per_token(self.shape, self.layer_types)

    @property
    def plain_kv_bytes(self) -> int:
        """That of a plain model."""
        return kv_bytes_per_token(self.shape, LayerTypes.plain(self.shape.num_layers))

    @property
    def policy_parameters(self) -> int:
        """Of the KV policy's own, in the whole model."""
        projection, model = self.run.compression.policy.traits.projection, self.run.model
        if projection is None:
            return 0
        shapes = projection.parameters(model.hidden_size, model.query_groups, bias=model.add_qkv_bias)
        return len(self.family.stored.kv_layers) * sum(map(math.prod, shapes.values()))

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.run.parallel.replica_size

    @property
    def optimizer_ranks(self) -> int:
        """Ranks over which the optimizer's state of one replica is shared out; 1: not at all."""
        parallel = self.run.parallel
        if not parallel.use_distributed_optimizer:
            return 1
        copies = self.data_parallel_size * parallel.context_parallel_size
        return copies // parallel.num_distributed_optimizer_instances

    @property
    def micro_batches(self) -> int:
        """Per step and replica."""
        train = self.run.train
        return train.global_batch_size // (train.micro_batch_size * self.data_parallel_size)

    @property
    def cost(self) -> TrainingCost:
        """Of a training step, with the teacher's forward."""
        cost = cost_of(self.run, self.shape)
        return cost if self.teacher is None else cost.plus(self.teacher.flops)

    @property
    def prompt(self) -> PromptCost:
        """Of a prompt as long as a training sequence."""
        return prompt_cost(self.shape, self.run.compression.with_map(self.layer_types))


def recomputed_layers(run: RunConfig) -> int:
    """Layers, over all stages, whose forward runs again in backward."""
    if run.train.recompute_granularity != "full":
        return 0
    most = run.train.recompute_num_layers or run.model.num_layers
    placement = place(run.model, run.compression, run.parallel, vocab_size=1, seq_length=1)
    return sum(min(most, len(placement.layers_of(stage))) for stage in range(placement.stages))


def cost_of(run: RunConfig, shape: ModelShape) -> TrainingCost:
    """Predicted FLOPs per token of a training step, or their mean where steps differ in passes or in maps.
    Recomputation counts where whole layers are recomputed; that of selective recompute and of a loss in
    chunks is left out. So is a teacher."""
    layers = recomputed_layers(run)
    costs = [
        training_cost(
            shape,
            replace(run.compression, forward_passes=passes),
            recomputed_layers=layers,
            trains_weights=run.train.trainable == "all",
        )
        for passes in forward_passes_of(run)
    ]
    model, hardware = (
        sum(getattr(cost, name) for cost in costs) / len(costs) for name in ("model_flops", "hardware_flops")
    )
    return TrainingCost(model, hardware, costs[0].plain_flops)


def forward_passes_of(run: RunConfig) -> range:
    """The numbers of passes without gradient of a run's steps, of which each is equally frequent."""
    most = run.compression.forward_passes
    constant = run.train.forward_passes_schedule == "constant"
    return range(most if constant else run.train.least_forward_passes, most + 1)
