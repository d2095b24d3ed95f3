"""What each rank holds, and whether that fits into a GPU with each kind of recompute."""

import math
from collections.abc import Iterator
from dataclasses import replace

from lckv.sharing.journey import Cargo
from lckv_megatron.planning.plan import Plan
from lckv_megatron.planning.teacher import teacher_memory
from lckv_megatron.tables import gib, table
from megatron_ext.config import TrainConfig
from megatron_ext.model.fit import RESERVED_BYTES, RESERVED_SHARE, RankMemory, fits, usable_bytes
from megatron_ext.model.memory import (
    StateBytes,
    checkpoint_bytes,
    kept_bytes,
    kept_for_backward,
    layer_bytes,
    loss_bytes,
    recomputed_of_stage,
    state_bytes,
)
from megatron_ext.model.parameters import StageParameters
from megatron_ext.precision import precision
from megatron_ext.summary.lines import host_lines

_NOTE = f"""\
needed: by the stage that holds most. activations: kept for backward, of all micro-batches in flight, with
fused kernels. working: logits of a chunk, or one layer. Formulas: megatron_ext/model/memory.py;
dropout is not counted. fits: into the GPU's memory without {RESERVED_SHARE:.0%} for gaps and
{RESERVED_BYTES / 2**30:g} GiB for CUDA and communication.
GPU-hours: recomputation of whole layers counts. * is this run."""

_EVERY_RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {"recompute_granularity": "none"},
    "selective mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "selective core_attn mlp": {
        "recompute_granularity": "selective",
        "recompute_modules": ("core_attn", "mlp"),
    },
    "full": {"recompute_granularity": "full"},
}


def stage_lines(plan: Plan) -> Iterator[str]:
    """A table of what lies in the memory of each stage's ranks."""
    yield from table(_per_rank(plan))
    shared = [teacher_memory(plan, number).shared for number in range(len(plan.stages))]
    if any(shared):
        yield (
            f"teacher: {gib(max(shared))} of its weights are the student's frozen ones and in memory once, "
            "assumed equal: the student was made of its teacher."
        )


def verdict_lines(plan: Plan) -> Iterator[str]:
    """A table of all kinds of recompute: memory, whether it fits, and time."""
    yield f"on {plan.gpu.name}, {gib(usable_bytes(plan.gpu.memory_bytes))} of it usable:"
    yield from table(_per_recompute(plan))
    yield from host_lines(plan.sizes, plan.gpu.peak_tflops(plan.run.train.precision))
    yield _NOTE


def checkpoint_line(plan: Plan) -> str:
    """What checkpoints take on the disk."""
    run = plan.run
    trained = None
    if run.train.trainable == "policy":
        trained = sum(stage.of_policy for stage in plan.stages)
    one = checkpoint_bytes(plan.sizes.parameters, precision(run.train.precision), trained)
    if run.checkpoint.save is None:
        return "checkpoints           none, checkpoint.save is not set"
    saves = math.ceil(run.train.train_iters / (run.checkpoint.save_interval or run.train.train_iters))
    kept = min(saves, run.checkpoint.keep_last or saves)
    most = min(saves, kept + 1)  # the oldest goes once the newest is there
    return (
        f"checkpoints           {gib(one)} each, {saves:,} of them; {kept:,} are kept: at most "
        f"{gib(most * one)} on the disk"
    )


def rank_memory(plan: Plan, number: int) -> RankMemory:
    """Of each rank of stage `number`."""
    run, stages, sizes = plan.run, plan.stages, plan.sizes
    model, compression, parallel, train = run.model, plan.compression, run.parallel, run.train
    stage = stages[number]
    state = _state_of(plan, stage)
    of_micro_batch = 0
    for layers in stage.chunks:
        recomputed = recomputed_of_stage(train, layers)
        kept = kept_for_backward(compression, model.num_layers, layers, recomputed)
        of_micro_batch += kept_bytes(kept, model, compression, parallel, train, fused=True)
    ticks = plan.ticks
    in_flight = min(len(stages) - number, sizes.micro_batches) if ticks is None else ticks.in_flight
    activations = in_flight * of_micro_batch + _prepared_bytes(plan, number)
    working = layer_bytes(model, compression, parallel, train, fused=True)
    teacher = teacher_memory(plan, number)
    if number == len(stages) - 1:
        of_loss, while_computed = loss_bytes(
            plan.padded_vocab_size, model, compression, parallel, train, fused=True
        )
        activations, working = activations + of_loss, max(working, while_computed + teacher.states)
    activations += teacher.waiting * teacher.states
    # where it reads before the student, nothing of the student's is kept yet
    reading = teacher.reading + (teacher.waiting + 1) * teacher.states
    return RankMemory(state.total + teacher.weights, activations, max(working, reading - activations))


def _state_of(plan: Plan, stage: StageParameters) -> StateBytes:
    run = plan.run
    return state_bytes(
        stage.per_rank,
        precision(run.train.precision),
        optimizer_ranks=plan.sizes.optimizer_ranks,
        optimizer=run.optimizer,
        trained=stage.of_policy if run.train.trainable == "policy" else None,
    )


def _per_rank(plan: Plan) -> Iterator[tuple[str, ...]]:
    teacher_head = [] if plan.teacher is None else ["teacher"]
    yield (
        "stage",
        "layers",
        "parameters",
        "weights",
        *teacher_head,
        "gradients",
        "optimizer",
        "activations",
        "sends per micro-batch",
    )
    for number, stage in enumerate(plan.stages):
        state = _state_of(plan, stage)
        teacher = [gib(teacher_memory(plan, number).weights) for _ in teacher_head]
        yield (
            str(number),
            " ".join(f"{layers.start}-{layers.stop - 1}" for layers in stage.chunks),
            f"{stage.per_rank:,}",
            gib(state.weights),
            *teacher,
            *map(gib, (state.gradients, state.optimizer)),
            gib(rank_memory(plan, number).activations),
            _sent(plan, number),
        )


def _per_recompute(plan: Plan) -> Iterator[tuple[str, ...]]:
    yield ("recompute", "state", "activations", "working", "needed", "verdict", "GPU-hours")
    for name, train in recompute_settings(plan.run.train):
        with_it = plan.with_training(train)
        largest = max(
            (rank_memory(with_it, number) for number in range(len(plan.stages))),
            key=lambda memory: memory.total,
        )
        seconds = with_it.seconds()
        yield (
            f"{'* ' if train == plan.run.train else ''}{name}",
            *map(gib, (largest.state, largest.activations, largest.working, largest.total)),
            "fits" if fits(largest, plan.gpu.memory_bytes) else "does not fit",
            "" if seconds is None else f"{seconds / 3600 * plan.world_size:,.0f}",
        )


def recompute_settings(train: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """All kinds by their names; that of the run too, where it is another."""
    settings = {
        name: replace(train, **{"recompute_num_layers": None, "activation_offload": "none", **changes})  # type: ignore[arg-type]  # fields of it
        for name, changes in _EVERY_RECOMPUTE.items()
    }
    for name, changed in settings.items():
        if train.activation_offload != "none":
            continue
        same = changed.recompute_granularity == train.recompute_granularity != "selective"
        if same and changed.recompute_num_layers == train.recompute_num_layers:
            settings[name] = train  # recompute_modules then say nothing
    if train.activation_offload != "none":
        settings[train.activation_offload] = train
    elif train not in settings.values():
        more = train.recompute_num_layers or " ".join(train.recompute_modules)
        settings[f"{train.recompute_granularity} {more}"] = train
    yield from settings.items()


def _sent(plan: Plan, stage: int) -> str:
    """What each rank of a stage sends forward with a micro-batch."""
    way = plan.placement.journey(plan.compression)
    visits = [visit for visit in (*way.prepare, *way.train) if visit.stage == stage and visit.sends]
    if not visits:
        return "-"
    sizes = [_payload_bytes(plan, visit.sends, visit.steps[-1].stop) for visit in visits if visit.sends]
    if len(visits) > 1:
        return f"{gib(sum(sizes))} in {len(visits)} parts"
    sent = visits[0].sends
    crossing = ", ".join(map(str, sorted({*sent.available, *sent.lent}))) if sent else ""
    return f"{gib(sizes[0])}: hidden states" + (f", KV of {crossing}" if crossing else "")


def _prepared_bytes(plan: Plan, stage: int) -> int:
    """Keys and values that wait on a stage for the first pass with gradient."""
    way, ticks = plan.placement.journey(plan.compression), plan.ticks
    cargoes = [
        Cargo(hidden=False, previous=visit.receives.previous, counts=False)
        for visit in way.prepare
        if visit.stage == stage and visit.prepares and visit.receives
    ]
    if ticks is None:
        return 0
    # they wait as those of whole sequences
    ranks = plan.run.parallel.context_parallel_size
    return ticks.ahead * ranks * sum(_payload_bytes(plan, cargo, 0) for cargo in cargoes)


def _payload_bytes(plan: Plan, cargo: Cargo, boundary: int) -> int:
    """What each rank below layer `boundary` sends with `cargo`."""
    # these load torch: only pipelines wait
    from lckv.pass_errors import reporter_of, reporting_layers
    from megatron_ext.parallel.pipeline_payload import PipelinePayload

    model, parallel, train = plan.run.model, plan.run.parallel, plan.run.train
    compression, ranks = plan.compression, parallel.tensor_model_parallel_size
    reporter, reporting = reporter_of(compression), reporting_layers(compression, model.num_layers)
    reports = cargo.counts and any(layer < boundary for layer in reporting)
    payload = PipelinePayload(
        cargo=cargo,
        hidden_size=model.hidden_size,
        sequence_shards=ranks if parallel.sequence_parallel else 1,
        kv_heads=max(1, model.query_groups // ranks),
        head_dim=model.head_dim,
        extra_channels=compression.policy.traits.extra_channels,
        sum_columns=len(reporter.statistics) * (ranks if reporter.per_rank else 1) * reports,
    )
    shape = payload.shape(parallel.tokens_of_rank(train.seq_length), train.micro_batch_size)
    numbers = math.prod(shape)
    return numbers * precision(train.precision).bytes
