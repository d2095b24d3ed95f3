"""What a training run keeps in a rank's memory, predicted without building the model. Neither torch nor
Megatron is loaded.

State, in bytes per parameter of the rank (data-parallel ranks share the optimizer's where it is distributed):
    bf16: weights 2, gradients 4, optimizer 12 (float32 weights and two moments)
    fp32: weights 4, gradients 4, optimizer 8
Parameters that are not trained have weights alone.

Activations that are kept for backward, for one micro-batch of b rows of s tokens:
    inputs x s b h / (C T)   +   shared x s b g (2 d + e)   +   lent x s b g d / C
    +   what each run that is not recomputed keeps
with h hidden size, g KV heads of the rank, d channels of a head, C context-parallel ranks, T tensor-parallel
ranks with sequence parallelism, else 1. `inputs` is the number of recomputed layers, where a layer counts
once for every pass with gradient. `shared` is the number of distinct keys and values that are kept: those
that some layer reads from another, and those of a layer that is not recomputed; each is stored once, of whole
rows, however many layers read it. Where keys and values go round the C ranks, each keeps its part: s / C.
`lent` is the number of keys, and of values, that some layer mixes into its own, and that are not kept anyway:
values are where the KV policy leaves them as they are, and both by a policy that looks at other tokens.
The last term: `layer_memory.py`. The last stage adds the final norm, and the gradient of its output, which is
made with the loss (`lckv/losses/linear_cross_entropy.py`).

Working memory is what a step needs beyond that for a while: the logits of a chunk of tokens, or the one layer
that is being recomputed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lckv.config import CompressionConfig
from lckv.losses.chunk_size import tokens_of_chunk
from lckv.sharing.plan import LayerRun, Origin, Part, Step
from megatron_ext.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_ext.model.layer_memory import LayerMemory
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


def state_bytes(
    parameters: int,
    numbers: Precision,
    *,
    optimizer_ranks: int,
    optimizer: OptimizerConfig | None = None,
    trained: int | None = None,
) -> StateBytes:
    """Of a rank with so many parameters, of which `trained` (default: all) have gradients and optimizer
    state, which is shared out over `optimizer_ranks` ranks (1: not at all). `optimizer` says in which dtypes
    and where it is kept; default: in float32, with the model."""
    trained = parameters if trained is None else trained
    per_parameter = numbers.optimizer_bytes if optimizer is None else _optimizer_bytes(optimizer, numbers)
    return StateBytes(
        weights=parameters * numbers.bytes,
        gradients=trained * 4,
        optimizer=round(trained * per_parameter / optimizer_ranks),
    )


def _optimizer_bytes(optimizer: OptimizerConfig, numbers: Precision) -> float:
    """Of the optimizer's state beside the model, per parameter."""
    if not optimizer.use_precision_aware_optimizer:
        return numbers.optimizer_bytes
    dtypes = (optimizer.main_params_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype)
    size = sum({"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}[dtype] for dtype in dtypes)
    offloaded = optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0
    return size * (1 - offloaded)


def checkpoint_bytes(parameters: int, numbers: Precision, trained: int | None = None) -> int:
    """A checkpoint of a model with so many parameters on the disk: weights, and the optimizer's state of the
    `trained` ones (default: all)."""
    return parameters * numbers.bytes + (parameters if trained is None else trained) * numbers.optimizer_bytes


@dataclass(frozen=True)
class Kept:
    """What is kept for backward on one pipeline stage."""

    inputs: int
    """Inputs [s / T, b, h] of layers that are recomputed."""

    shared: int
    """Keys [s, b, g, d + e] and values [s, b, g, d]."""

    runs: tuple[LayerRun, ...] = ()
    """Runs of layers that are not recomputed."""

    compared: int = 0
    """Layers whose keys and values of passes are compared (`lckv.pass_errors`)."""

    lent: int = 0
    """Keys, and values, [s, b, g, d] that are mixed into those of other layers and not among `shared`."""


def kept_for_backward(
    compression: CompressionConfig, num_layers: int, layers: range, recomputed: range | None = None
) -> Kept:
    """For the pipeline stage with `layers`, of which those in `recomputed` (default: all) run again in
    backward. At least one pass without gradient (m >= 1) is assumed of cyclic groups."""
    recomputed = layers if recomputed is None else recomputed
    steps = [step for step in compression.plan(num_layers) if step.requires_grad]
    runs = [run for step in steps for run in step.runs if run.index in layers]
    # A pass that only prepares the next one ends at keys and values alone, which are never recomputed.
    whole = tuple(run for run in runs if run.index not in recomputed or run.part is not Part.WHOLE)
    read = {reads for run in runs if run.part is Part.WHOLE for reads in run.all_reads}
    # What arrives from the previous stage is one tensor, kept whole: also what only later stages read.
    read |= {
        reads
        for step in steps
        if step.update
        for run in step.runs
        if run.index >= layers.start
        for reads in run.all_reads
        if reads.source < layers.start
    }
    shared = {(reads.source, reads.number) for reads in read if reads.origin is not Origin.OWN}
    own = {(reads.source, reads.number) for run in whole if run.part is Part.WHOLE for reads in run.all_reads}
    compares = compression.first_guess or compression.agreement_loss_coefficient
    sources = compression.map(num_layers).cyclic_sources if compares else ()
    if compression.policy.traits.token_wise:
        held, of_held = {source for source, _ in shared | own}, 1
    else:  # such a policy keeps what it is given, which is what is lent
        held, of_held = {run.index for run in whole}, 0
    return Kept(
        len(runs) - len(whole),
        len(shared | own),
        whole,
        len([index for index in sources if index in layers]),
        sum(of_held if lender in held else 2 for lender, _ in _lent(steps, layers)),
    )


def _lent(steps: Sequence[Step], layers: range) -> set[tuple[int, int]]:
    """What is mixed in on the stage with `layers`, or further up: layer and pass that it comes from."""
    return {
        (run.mixes, step.number if run.mixes >= step.group.start else -1)
        for step in steps
        for run in step.runs
        if run.mixes is not None and (run.index in layers or (run.index >= layers.start > run.mixes))
    }


def recomputed_of_stage(train: TrainConfig, layers: range) -> range:
    """The layers of a stage that run again in backward, as wholes or by tokens."""
    if train.activation_offload == "token_wise":
        return layers
    if train.recompute_granularity != "full":
        return layers[:0]
    return layers[: train.recompute_num_layers or len(layers)]


def kept_bytes(
    kept: Kept,
    model: ModelConfig,
    compression: CompressionConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    *,
    fused: bool = False,
) -> int:
    """Of one micro-batch on one rank; `fused`: see `layer_memory.py`. Where activations go to the host, only
    keys and values that several layers read stay."""
    ranks = parallel.tensor_model_parallel_size
    tokens = parallel.tokens_of_rank(train.seq_length) * train.micro_batch_size
    hidden = tokens * model.hidden_size // (ranks if parallel.sequence_parallel else 1)
    key_value = key_value_numbers(model, compression, parallel, train)
    lent = tokens * max(1, model.query_groups // ranks) * model.head_dim
    if train.trainable != "all" and not kept.inputs:
        lent = 0  # else it is an input of what is computed again, or for gradients of the weights that mix it
    layer = LayerMemory(model, compression, parallel, train, fused=fused)
    if train.activation_offload == "token_wise":
        return precision(train.precision).bytes * (kept.shared * key_value + kept.lent * lent)
    tensors = precision(train.precision).bytes * (
        kept.inputs * hidden + kept.shared * key_value + kept.lent * lent
    )
    compared = _compared_bytes(model, compression, parallel, train)
    return tensors + sum(map(layer.kept, kept.runs)) + kept.compared * compared


def _compared_bytes(
    model: ModelConfig, compression: CompressionConfig, parallel: ParallelConfig, train: TrainConfig
) -> int:
    """For each layer of which passes are compared: the differences, in float32, and the sizes that divide
    their sums; of a first guess its normalised input, of whole rows."""
    tokens, number = parallel.tokens_of_rank(train.seq_length) * train.micro_batch_size, 4
    heads = max(1, model.query_groups // parallel.tensor_model_parallel_size)
    errors = compression.first_guess + (compression.agreement_loss_coefficient > 0)
    kept = number * errors * 2 * heads * (tokens * model.head_dim + train.micro_batch_size)
    if not compression.first_guess:
        return kept
    return kept + precision(train.precision).bytes * tokens * model.hidden_size


def key_value_numbers(
    model: ModelConfig, compression: CompressionConfig, parallel: ParallelConfig, train: TrainConfig
) -> int:
    """In the keys and values of a layer that a rank keeps of a micro-batch."""
    tokens = parallel.key_tokens_of_rank(train.seq_length) * train.micro_batch_size
    heads = max(1, model.query_groups // parallel.tensor_model_parallel_size)
    return tokens * heads * (2 * model.head_dim + compression.policy.traits.extra_channels)


def loss_bytes(
    padded_vocab: int, model: ModelConfig, compression: CompressionConfig, parallel: ParallelConfig,
    train: TrainConfig, *, fused: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """What the last stage keeps of a micro-batch for the final norm and the loss, and what the loss needs
    besides while it is computed: the logits of a chunk in float32, their gradient in the model's precision
    (of a student: both models' logits, and as many numbers once more, in float32), and where sequence
    parallelism has gathered the states, these.

    The gradient of the output weight is added to the sums that are there."""
    tokens = parallel.tokens_of_rank(train.seq_length) * train.micro_batch_size
    norm = tokens * LayerMemory(model, compression, parallel, train, fused=fused).norm
    rows = padded_vocab // parallel.tensor_model_parallel_size
    number = precision(train.precision).bytes
    states = tokens * model.hidden_size * number
    chunk = min(tokens, tokens_of_chunk(rows, asked=model.cross_entropy_chunk_size))
    copied = number if number < 4 else 0
    of_logit = 4 + copied if train.distillation.teacher is None else 4 * 4
    working = chunk * rows * of_logit + (states if parallel.sequence_parallel else 0)
    return round(norm) + states, working


def layer_bytes(
    model: ModelConfig,
    compression: CompressionConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    *,
    fused: bool = False,
) -> int:
    """The most that one run of a layer keeps while it is recomputed, keys and values left out. Where
    activations go to the host, three layers: two buffers, and the gradients of a layer; in forward one that
    computes, and one on its way. Keys and values that go round take six parts besides, in backward: two that
    are on their way, two with their gradients, those of the own part, and those that a rank adds."""
    nothing = replace(train, recompute_granularity="none")
    at_once = 3 if train.activation_offload == "token_wise" else 1
    layer = LayerMemory(model, compression, parallel, nothing, fused=fused)
    steps = compression.plan(model.num_layers)
    most = max(layer.kept(run) for step in steps if step.requires_grad for run in step.runs)
    if not parallel.sends_keys_round:
        return at_once * most
    part = precision(train.precision).bytes * key_value_numbers(model, compression, parallel, train)
    return at_once * most + 6 * part
