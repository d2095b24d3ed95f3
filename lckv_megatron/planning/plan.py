"""A run whose sizes fit together, and what follows from them."""

from dataclasses import dataclass, field, replace

from lckv.config import CompressionConfig
from lckv.cost import ModelShape
from lckv.sharing.layer_types import LayerTypes
from megatron_ext.config import RunConfig, TrainConfig
from megatron_ext.gpus import GPUS, Gpu
from megatron_ext.model.cost import model_shape
from megatron_ext.model.parameters import (
    StageParameters,
    padded_vocab_size,
    stage_parameters,
    total_parameters,
)
from megatron_ext.model.placement import Placement, place
from megatron_ext.restoring.description import Description
from megatron_ext.restoring.teacher import layout_of_teacher
from megatron_ext.schedule.ticks import Ticks, ticks_of
from megatron_ext.summary.sizes import RunSizes, TeacherSizes


@dataclass(frozen=True)
class Plan:
    """A run whose sizes fit together, on so many pretended processes."""

    run: RunConfig
    world_size: int
    vocab_size: int
    """True vocabulary, in tokens."""

    utilisation: float
    """Share of the peak that the run is assumed to reach, recomputation counted as work."""

    gpu: Gpu = field(default_factory=lambda: GPUS["H100"])

    mfu: float | None = None
    """Share of the peak that the model's own operations are assumed to reach, instead of `utilisation`."""

    teacher: Description | None = None
    """Of a run that distils; None: there is none, or it cannot teach this model on any layout."""

    @property
    def teacher_here(self) -> Description | None:
        """The teacher on this layout, as it reads the same micro-batches."""
        if self.teacher is None:
            return None
        mine, its = self.run.train, self.teacher.run
        train = TrainConfig(
            micro_batch_size=mine.micro_batch_size,
            global_batch_size=mine.global_batch_size,
            seq_length=mine.seq_length,
            precision=its.train.precision,
        )
        run = replace(its, parallel=layout_of_teacher(self.run.parallel), train=train)
        return replace(self.teacher, run=run)

    @property
    def teacher_plan(self) -> "Plan | None":
        """The teacher as a run of its own."""
        here = self.teacher_here
        if here is None:
            return None
        return replace(self, run=here.run, vocab_size=here.vocab_size, teacher=None)

    @property
    def shape(self) -> ModelShape:
        """For lckv.cost."""
        return model_shape(
            self.run.model, vocab_size=self.padded_vocab_size, seq_length=self.run.train.seq_length
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return padded_vocab_size(self.vocab_size, self.run.model, self.run.parallel)

    @property
    def layer_types(self) -> LayerTypes:
        """The sharing map; of a family its first one."""
        return self.run.compression.family(self.run.model.num_layers).first

    @property
    def compression(self) -> CompressionConfig:
        """The section of the run; of a family of maps that with the heaviest one, which memory must suffice
        for."""
        return self.run.compression.heaviest(self.run.model.num_layers)

    @property
    def context(self) -> int:
        """Tokens of a full context."""
        return self.run.model.max_position_embeddings or self.run.train.seq_length

    @property
    def sizes(self) -> RunSizes:
        """What the run itself says too."""
        parameters = total_parameters(self.stages, self.run.parallel)
        teacher, sizes = self.teacher_here, None
        if teacher is not None:
            sizes = TeacherSizes.of(
                teacher.run, vocab_size=teacher.vocab_size, seq_length=self.run.train.seq_length
            )
        return RunSizes(self.run, self.shape, self.world_size, parameters, sizes)

    @property
    def placement(self) -> Placement:
        """The layers of the pipeline stages."""
        return place(
            self.run.model,
            self.run.compression,
            self.run.parallel,
            vocab_size=self.vocab_size,
            seq_length=self.run.train.seq_length,
        )

    @property
    def ticks(self) -> Ticks | None:
        """The schedule of a step, where micro-batches come to a stage several times."""
        way = self.placement.journey(self.compression)
        in_flight = self.run.parallel.pipeline_in_flight
        if not way.circulates:
            return None
        return ticks_of(self.placement, way, self.sizes.micro_batches, in_flight)

    @property
    def stages(self) -> tuple[StageParameters, ...]:
        """Parameters of the pipeline stages."""
        return stage_parameters(
            self.run.model,
            self.run.compression,
            self.run.parallel,
            self.placement,
            vocab_size=self.vocab_size,
        )

    @property
    def tokens(self) -> int:
        """That the run trains on."""
        train = self.run.train
        return train.train_iters * train.global_batch_size * train.seq_length

    @property
    def peak_tflops(self) -> float | None:
        """Of one device; None where it is not known."""
        given = self.run.logging.peak_tflops
        return self.gpu.peak_tflops(self.run.train.precision) if given is None else given

    def seconds(self) -> float | None:
        """Of the whole run."""
        peak, cost = self.peak_tflops, self.sizes.cost
        if peak is None:
            return None
        per_token = cost.hardware_flops / self.utilisation
        if self.mfu is not None:
            per_token = cost.model_flops / self.mfu
        return per_token * self.tokens / (self.world_size * peak * 1e12)

    def with_training(self, train: TrainConfig) -> "Plan":
        """The same with another section `train`."""
        return replace(self, run=replace(self.run, train=train))
