"""Other layouts of a run on the same GPUs: which fit, and which of them takes the shortest steps.

Tried are TP (powers of two inside a node), PP (powers of two), with the least recomputation for which the
formulas of the plan say that the memory is enough, at micro-batches of one row and of the most rows that fit.
The first and the last stage of each are dry run. The global batch, the map and the GPUs stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.rank import RankRun
from lckv_megatron.dry_run.report import step_seconds, verdict
from lckv_megatron.dry_run.stages import first_ranks, simulate_ranks
from lckv_megatron.planning.memory import rank_memory, recompute_settings
from lckv_megatron.planning.plan import Plan
from lckv_megatron.tables import gib
from megatron_ext.model.fit import usable_bytes
from megatron_ext.validation.run import step_problems

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Tried:
    """A layout, and what its first and last stage do; nothing where the formulas say that it does not fit."""

    plan: Plan
    ranks: tuple[RankRun, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the rank that needs most."""
        return max((rank.memory.peak_bytes for rank in self.ranks), default=formula_bytes(self.plan))

    @property
    def seconds(self) -> float | None:
        """Of a step; None where it does not fit."""
        stages = self.plan.run.parallel.pipeline_model_parallel_size
        if not self.ranks or self.peak_bytes > usable_bytes(self.plan.gpu.memory_bytes):
            return None
        return max(step_seconds(rank, stages) for rank in self.ranks)


def formula_bytes(plan: Plan) -> int:
    """What the rank that needs most needs by the formulas of the plan."""
    return max(rank_memory(plan, stage).total for stage in range(len(plan.stages)))


def search(plan: Plan, machine: Machine) -> list[Tried]:
    """All layouts that are tried, the shortest step first, then those that do not fit.

    Raises ConfigError as `simulate_ranks` does.
    """
    tried = [_try(candidate, machine) for candidate in candidates(plan, machine.gpus_per_node)]
    return sorted(tried, key=lambda one: (one.seconds is None, one.seconds or one.peak_bytes))


def candidates(plan: Plan, gpus_per_node: int) -> Iterator[Plan]:
    """The run's own layout, then others whose sizes fit together; the last kind of recompute where the
    formulas say that nothing fits."""
    yield plan
    for tensor in _powers(gpus_per_node):
        for pipeline in _powers(plan.run.model.num_layers):
            yield from (other for other in _of_layout(plan, tensor, pipeline) if other != plan)


def _of_layout(plan: Plan, tensor: int, pipeline: int) -> Iterator[Plan]:
    parallel = replace(
        plan.run.parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=tensor > 1,
    )
    of_rows = {
        rows: [
            replace(plan, run=replace(plan.run, parallel=parallel, train=train))
            for _, train in recompute_settings(replace(plan.run.train, micro_batch_size=rows))
        ]
        for rows in _MICRO_BATCHES
    }
    last = None
    for of_recompute in zip(*of_rows.values(), strict=True):
        possible = [other for other in of_recompute if _is_possible(other)]
        usable = usable_bytes(plan.gpu.memory_bytes)
        fitting = [other for other in possible if formula_bytes(other) <= usable]
        if fitting:
            yield from (fitting[0], *fitting[1:][-1:])
            return
        last = possible[0] if possible else last
    if last is not None:
        yield last


def _is_possible(plan: Plan) -> bool:
    teacher = plan.teacher_here
    of_teacher = [] if teacher is None else teacher.layout_problems(plan.world_size)
    return not (step_problems(plan.run, plan.world_size) or of_teacher)


def _powers(most: int) -> Iterator[int]:
    number = 1
    while number <= most:
        yield number
        number *= 2


def _try(plan: Plan, machine: Machine) -> Tried:
    if formula_bytes(plan) > usable_bytes(plan.gpu.memory_bytes):
        return Tried(plan, ())
    ranks = first_ranks(plan)
    return Tried(plan, tuple(simulate_ranks(plan, sorted({ranks[0], ranks[-1]}), machine)))


def search_rows(own: Plan, tried: list[Tried], machine: Machine) -> Iterator[tuple[str, ...]]:
    """A line for each; the first row is the head."""
    yield ("layout", "micro-batch", "recompute", "peak", "seconds of a step", "tokens/s per GPU", "verdict")
    for one in tried:
        train, seconds = one.plan.run.train, one.seconds
        tokens = train.global_batch_size * train.seq_length
        speed = "-" if seconds is None else f"{tokens / seconds / one.plan.world_size:,.0f}"
        yield (
            ("* " if one.plan == own else "") + _layout(one.plan),
            str(train.micro_batch_size),
            next(name for name, of_kind in recompute_settings(train) if of_kind == train),
            gib(one.peak_bytes),
            "-" if seconds is None else f"{seconds:.3g}",
            speed,
            _verdict(one, machine),
        )


def _layout(plan: Plan) -> str:
    parallel = plan.run.parallel
    context = f", CP {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
    return (
        f"TP {parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size}{context}, "
        f"DP {plan.sizes.data_parallel_size}"
    )


def _verdict(tried: Tried, machine: Machine) -> str:
    if tried.ranks:
        return verdict(max(tried.ranks, key=lambda rank: rank.memory.peak_bytes), machine)
    over = tried.peak_bytes - usable_bytes(machine.gpu.memory_bytes)
    return f"does not fit: {gib(over)} too much by the formulas"
