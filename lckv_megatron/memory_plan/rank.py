"""The memory plan of a rank, from the trace of its program."""

from dataclasses import dataclass

from lckv_megatron.memory_plan import caching_allocator
from lckv_megatron.memory_plan.blocks import StepPlacement, kept_sizes, place_step
from lckv_megatron.memory_plan.caching_allocator import Reserved
from lckv_megatron.memory_plan.requests import live_peak
from lckv_megatron.memory_plan.trace import Trace

SECONDS = 5.0
"""For each integer program."""


@dataclass(frozen=True, eq=False)
class RankPlan:
    """The plan of one rank beside the allocator. Bytes of the plan are those of a step; the allocator also
    sees how the model is built and a step before."""

    rank: int
    persistent: int
    """Bytes that are there before and behind the step: the plan has them at its lowest addresses."""
    live_peak: int
    """Bytes, persistent ones included."""
    placement: StepPlacement
    """Of all that comes or goes in the step."""
    largest_kept: int
    """Bytes that the layer which keeps most has between forward and backward."""
    segments: Reserved
    """By the allocator as it is by default."""
    expandable: Reserved
    """With expandable_segments."""

    @property
    def peak(self) -> int:
        """Bytes that the plan needs."""
        return self.persistent + self.placement.peak

    @property
    def gap(self) -> float:
        """Share of the planned peak above that of the live bytes."""
        return 1 - self.live_peak / self.peak

    @property
    def gain(self) -> float:
        """Share of what expandable segments reserve that the plan does not need."""
        return 1 - self.peak / self.expandable.reserved


def plan_rank(rank: int, trace: Trace, *, seconds: float = SECONDS) -> RankPlan:
    """Plan the step of a trace; an integer program takes at most so many seconds."""
    requests, stretches = [*trace.step_requests()], trace.step_stretches()
    return RankPlan(
        rank=rank,
        persistent=trace.persistent,
        live_peak=trace.persistent + live_peak(requests),
        placement=place_step(requests, stretches, seconds=seconds),
        largest_kept=max(map(sum, kept_sizes(requests, stretches).values()), default=0),
        segments=caching_allocator.run(trace.requests, expandable=False),
        expandable=caching_allocator.run(trace.requests, expandable=True),
    )
