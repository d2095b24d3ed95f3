"""What a memory plan says, as tables."""

from collections.abc import Iterator, Sequence

from lckv_megatron.memory_plan.rank import RankPlan
from lckv_megatron.tables import gib, size, table

GAINS_FROM = 0.02
"""Share of the memory from which on planning is worth more than a setting of the allocator."""
_KINDS = 6
"""Kinds of blocks that are told of a rank, the largest ones."""


def describe(plans: Sequence[RankPlan]) -> Iterator[str]:
    """All tables, and what follows."""
    yield "dry run: memory planned, beside PyTorch's caching allocator (simulated), at the peak"
    yield from table(plan_rows(plans))
    yield verdict(plans)
    for plan in plans:
        yield ""
        placement = plan.placement
        yield (
            f"dry run: blocks of rank {plan.rank}, the largest first; {placement.loose:,} requests are in "
            f"none; the layer that keeps most keeps {size(plan.largest_kept)}"
        )
        yield from table(kind_rows(plan))


def verdict(plans: Sequence[RankPlan]) -> str:
    """Whether planning is worth it."""
    plan = max(plans, key=lambda plan: plan.gain)
    saved = size(plan.expandable.reserved - plan.peak)
    said = f"Planning saves {100 * plan.gain:.1f} % of what expandable segments reserve, {saved}"
    if plan.gain < GAINS_FROM:
        setting = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        return f"{said}: keep to them, as the launchers do ({setting})."
    return f"{said}."


def plan_rows(plans: Sequence[RankPlan]) -> Iterator[tuple[str, ...]]:
    """A row for each rank; the first row is the head."""
    yield (
        "rank", "live", "planned", "above live", "reserved", "fragmented", "expandable", "fragmented",
        "saved",
    )  # fmt: skip
    for plan in plans:
        yield (
            str(plan.rank),
            gib(plan.live_peak),
            gib(plan.peak),
            f"{100 * plan.gap:.2f} %",
            gib(plan.segments.reserved),
            f"{100 * plan.segments.fragmentation:.2f} %",
            gib(plan.expandable.reserved),
            f"{100 * plan.expandable.fragmentation:.2f} %",
            f"{100 * plan.gain:.2f} %",
        )


def kind_rows(plan: RankPlan) -> Iterator[tuple[str, ...]]:
    """A row for each of the largest kinds of blocks; the first row is the head."""
    yield ("block", "of them", "requests", "small", "placed", "live", "planned", "kept", "how")
    for kind in plan.placement.kinds[:_KINDS]:
        yield (
            kind.name,
            f"{kind.blocks:,}",
            f"{kind.requests:,}",
            f"{kind.small:,}",
            f"{kind.placed:,}",
            size(kind.live_peak),
            size(kind.peak),
            size(kind.kept),
            kind.how,
        )
