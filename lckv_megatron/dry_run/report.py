"""What a dry run says: memory, collectives and time of each rank, a table each."""

from collections.abc import Iterator, Sequence

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.memory import KINDS
from lckv_megatron.dry_run.rank import RankRun
from lckv_megatron.tables import gib, table
from megatron_ext.model.fit import usable_bytes


def bubble_seconds(rank: RankRun, stages: int) -> float:
    """That a rank waits for other stages in a step: the time of a micro-batch for each of them, or what the
    list of the step's work says."""
    if rank.ring_bubble is not None:
        return rank.busy_seconds * rank.ring_bubble / (1 - rank.ring_bubble)
    return (stages - 1) * rank.micro_batch_seconds


def step_seconds(rank: RankRun, stages: int) -> float:
    """Of one step where nothing overlaps but copies to the host."""
    return rank.busy_seconds + bubble_seconds(rank, stages)


def verdict(rank: RankRun, machine: Machine) -> str:
    """Whether the rank's peak fits, and if not by how much and what is largest."""
    over = rank.memory.peak_bytes - usable_bytes(machine.gpu.memory_bytes)
    if over <= 0:
        return "fits"
    kind, most = max(rank.memory.peak.items(), key=lambda item: item[1])
    return f"does not fit: {gib(over)} too much; largest are {kind}, {gib(most)}"


def mfu(ranks: Sequence[RankRun], machine: Machine, stages: int, model_flops: float) -> float:
    """`model_flops` of a step on each device over what its peak could do meanwhile."""
    seconds = max(step_seconds(rank, stages) for rank in ranks)
    return model_flops / (seconds * machine.tflops * 1e12)


def describe(ranks: Sequence[RankRun], machine: Machine, stages: int, model_flops: float) -> Iterator[str]:
    """All tables; `stages` of the pipeline, `model_flops` of a step on each device."""
    usable = usable_bytes(machine.gpu.memory_bytes)
    yield f"dry run: memory at the peak of a step, on {machine.gpu.name}, {gib(usable)} of it usable"
    yield from table(memory_rows(ranks, machine))
    yield from teacher_lines(ranks)
    yield ""
    yield f"dry run: collectives of a step, over {machine.network.name} between nodes"
    yield from table(collective_rows(ranks))
    yield ""
    if any(rank.host for rank in ranks):
        yield "dry run: activations on the host, in a step"
        yield from table(host_rows(ranks, machine))
        yield ""
    yield "dry run: seconds of a step"
    yield from table(time_rows(ranks, machine, stages))
    slowest = max(ranks, key=lambda rank: step_seconds(rank, stages))
    yield f"A step takes {step_seconds(slowest, stages):.3g} s, by rank {slowest.rank}. That is an estimate:"
    yield f"{machine.efficiency.describe()};"
    yield "nothing overlaps, documents are as long as rows. bubble: PP - 1 micro-batches of this rank,"
    yield "or what the list of the step's work says (docs/pipelines.md)."
    yield f"share of peak: of {machine.tflops:g} TFLOP/s, recomputation counted."
    share = 100 * mfu(ranks, machine, stages, model_flops)
    yield f"MFU {share:.1f} %: what the method asks for, nothing that is computed again; of causal attention"
    yield "the half that is seen, its backward twice its forward."


def memory_rows(ranks: Sequence[RankRun], machine: Machine) -> Iterator[tuple[str, ...]]:
    """At the peak of a step; the first row is the head."""
    yield ("rank", "stage", "weights held", *KINDS, "peak", "verdict")
    for rank in ranks:
        yield (
            str(rank.rank),
            str(rank.stage),
            f"{rank.parameters:,}",
            *(gib(number) for number in rank.memory.peak.values()),
            gib(rank.memory.peak_bytes),
            verdict(rank, machine),
        )


def teacher_lines(ranks: Sequence[RankRun]) -> Iterator[str]:
    """What of a teacher's weights is among the parameters."""
    for rank in ranks:
        if rank.teacher is not None:
            own, shared = map(gib, rank.teacher)
            yield (
                f"parameters of rank {rank.rank}: {own} are the teacher's; {shared} are frozen ones of the "
                "model that are assumed to be the teacher's, too"
            )


def collective_rows(ranks: Sequence[RankRun]) -> Iterator[tuple[str, ...]]:
    """Of a step, the longest first; the first row is the head."""
    yield ("rank", "collective", "group", "ranks", "count", "in all", "seconds")
    for rank in ranks:
        for key, total in sorted(rank.collectives.items(), key=lambda item: -item[1].seconds):
            yield (
                str(rank.rank),
                key.kind,
                key.group,
                str(key.ranks),
                f"{total.count:,}",
                gib(total.bytes),
                f"{total.seconds:.3g}",
            )


def host_rows(ranks: Sequence[RankRun], machine: Machine) -> Iterator[tuple[str, ...]]:
    """Of ranks whose activations go there, in a step; the first row is the head."""
    yield (
        "rank", "share", "to the host", "back", "its memory", "of a node", "computed again", "copies",
        "waited for",
    )  # fmt: skip
    for rank in ranks:
        if (host := rank.host) is not None:
            yield (
                str(rank.rank),
                f"{100 * host.share:.0f} %",
                *map(gib, (host.to_host, host.from_host, host.pool_bytes)),
                gib(machine.gpus_per_node * host.pool_bytes),
                f"{host.again_flops:.3e}",
                f"{host.seconds:.3g} s",
                f"{host.waited_seconds:.3g} s",
            )


def time_rows(ranks: Sequence[RankRun], machine: Machine, stages: int) -> Iterator[tuple[str, ...]]:
    """Seconds of a step; the first row is the head."""
    yield (
        "rank", "forward", "backward", "optimizer", "other", "collectives", "copies", "bubble", "step",
        "FLOPs", "share of peak",
    )  # fmt: skip
    for rank in ranks:
        phases = {name: work.seconds for name, work in rank.phases.items()}
        named = [phases.pop(name, 0.0) for name in ("forward", "backward", "optimizer")]
        bubble, step = bubble_seconds(rank, stages), step_seconds(rank, stages)
        copies = 0.0 if rank.host is None else rank.host.waited_seconds
        seconds = (*named, sum(phases.values()), rank.collective_seconds, copies, bubble, step)
        yield (
            str(rank.rank),
            *(f"{number:.3g}" for number in seconds),
            f"{rank.flops:.3e}",
            f"{100 * rank.flops / (step * machine.tflops * 1e12):.1f} %",
        )
