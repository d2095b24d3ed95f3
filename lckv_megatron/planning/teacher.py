"""What the teacher of a run that distils takes on each rank: weights, hidden states that wait for the
student, and the memory of its own forward."""

from dataclasses import dataclass, replace

from lckv_megatron.planning.plan import Plan
from megatron_ext.config import ModelConfig
from megatron_ext.model.memory import Kept, kept_bytes, kept_for_backward, layer_bytes, state_bytes
from megatron_ext.model.parameters import StageParameters
from megatron_ext.precision import precision

_OF_WEIGHTS = (
    "num_layers", "hidden_size", "ffn_size", "num_attention_heads", "query_groups", "head_dim",
    "qk_layernorm", "add_qkv_bias", "untie_embeddings_and_output_weights",
)  # fmt: skip


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes on each rank of a pipeline stage."""

    weights: int = 0
    """Of its own."""

    shared: int = 0
    """Of weights that are the student's frozen ones, in memory once."""

    states: int = 0
    """Under its output layer, of a micro-batch."""

    waiting: int = 0
    """Micro-batches whose states wait while the first one is learned from."""

    reading: int = 0
    """At most, while it reads: a layer, and of micro-batches that are on their way the keys and values that
    others read."""


def teacher_memory(plan: Plan, number: int) -> TeacherMemory:
    """On stage `number`; zeros where there is no teacher. Frozen weights of the student are assumed equal to
    the teacher's where all sizes are the same: that is what it is for, and only the run itself can look."""
    teacher = plan.teacher_plan
    if teacher is None:
        return TeacherMemory()
    model, compression, parallel, train = (
        teacher.run.model, teacher.compression, teacher.run.parallel, teacher.run.train
    )  # fmt: skip
    theirs, numbers = teacher.stages[number], precision(train.precision)
    shared = numbers.bytes * _shared(plan, teacher, plan.stages[number], theirs)
    is_last, alone = number == len(plan.stages) - 1, len(plan.stages) == 1
    tokens = parallel.tokens_of_rank(train.seq_length) * train.micro_batch_size
    states = tokens * model.hidden_size * numbers.bytes * is_last
    kept = [kept_for_backward(compression, model.num_layers, layers) for layers in theirs.chunks]
    lasting = Kept(inputs=2, shared=max(of_chunk.shared for of_chunk in kept))
    ring = teacher.ticks
    on_the_way = 1 if ring is None else ring.in_flight + ring.ahead
    return TeacherMemory(
        weights=state_bytes(theirs.per_rank, numbers, optimizer_ranks=1, trained=0).total - shared,
        shared=shared,
        states=states,
        waiting=0 if alone else plan.sizes.micro_batches - 1,
        reading=on_the_way * kept_bytes(lasting, model, compression, parallel, train, fused=True)
        + layer_bytes(model, compression, parallel, train, fused=True),
    )


def _shared(plan: Plan, teacher: Plan, mine: StageParameters, theirs: StageParameters) -> int:
    """Parameters of a rank that student and teacher have in common."""
    run = plan.run
    if run.train.trainable == "all" or run.train.precision != teacher.run.train.precision:
        return 0
    frozen = replace(mine, copied=mine.copied - mine.of_policy, of_policy=0)
    others = replace(theirs, copied=theirs.copied - theirs.of_policy, of_policy=0)
    same = frozen == others and _sizes(run.model) == _sizes(teacher.run.model)
    return frozen.per_rank if same else 0


def _sizes(model: ModelConfig) -> tuple[object, ...]:
    return tuple(getattr(model, name) for name in _OF_WEIGHTS)
