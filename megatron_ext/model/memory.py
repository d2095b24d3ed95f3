"""What a training run keeps in a rank's memory, predicted without building the model. Neither torch nor
Megatron is loaded.

State, in bytes per parameter of the rank (data-parallel ranks share the optimizer's where it is distributed):
    bf16: weights 2, gradients 4, optimizer 12 (float32 weights and two moments)
    fp32: weights 4, gradients 4, optimizer 8

Activations that full recompute keeps for backward, for one micro-batch of b rows of s tokens:
    inputs x s b h / T   +   shared x s b g (2 d + e)
with h hidden size, g KV heads of the rank, d channels of a head, T tensor-parallel ranks with sequence
parallelism, else 1. `inputs` is the number of layers, where a layer counts once for every pass with gradient.
`shared` is the number of distinct keys and values that some layer reads from another: each is stored once,
however many layers read it. Not counted: what the embedding, the final norm and the loss keep, the logits,
and the working memory of the one layer that is being computed.
"""

from dataclasses import dataclass

from lckv.config import CompressionConfig
from lckv.sharing.plan import Origin, Part
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.precision import Precision, precision


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds between steps."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(parameters: int, numbers: Precision, *, optimizer_ranks: int) -> StateBytes:
    """Of a rank with so many parameters, whose optimizer state is shared out over `optimizer_ranks` ranks (1:
    not at all)."""
    return StateBytes(
        weights=parameters * numbers.bytes,
        gradients=parameters * 4,
        optimizer=round(parameters * numbers.optimizer_bytes / optimizer_ranks),
    )


@dataclass(frozen=True)
class Kept:
    """What full recompute keeps for backward on one pipeline stage, in tensors."""

    inputs: int
    """Layer inputs [s / T, b, h]."""

    shared: int
    """Keys [s, b, g, d + e] and values [s, b, g, d] that a layer reads from another."""

    extra_channels: int = 0
    """e: channels that the KV policy gives keys beyond those of values."""


def kept_by_full_recompute(compression: CompressionConfig, num_layers: int, layers: range) -> Kept:
    """For the pipeline stage with `layers`. At least one pass without gradient (m >= 1)
    is assumed of cyclic groups."""
    steps = [step for step in compression.plan(num_layers) if step.requires_grad]
    runs = [run for step in steps for run in step.runs if run.index in layers]
    read = {run.reads for run in runs if run.part is Part.WHOLE and run.reads}
    # What arrives from the previous stage is one tensor, kept whole: also what only later stages read.
    read |= {
        run.reads
        for step in steps
        if step.update
        for run in step.runs
        if run.index >= layers.start and run.reads and run.reads.source < layers.start
    }
    shared = {(reads.source, reads.number) for reads in read if reads.origin is not Origin.OWN}
    return Kept(len(runs), len(shared), compression.policy.traits.extra_channels)


def kept_bytes(kept: Kept, model: ModelConfig, parallel: ParallelConfig, train: TrainConfig) -> int:
    """Of one micro-batch on one rank."""
    ranks = parallel.tensor_model_parallel_size
    tokens = train.seq_length * train.micro_batch_size
    hidden = tokens * model.hidden_size // (ranks if parallel.sequence_parallel else 1)
    channels = 2 * model.head_dim + kept.extra_channels
    key_value = tokens * max(1, model.query_groups // ranks) * channels
    return precision(train.precision).bytes * (kept.inputs * hidden + kept.shared * key_value)
