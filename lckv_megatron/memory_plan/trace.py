"""What a program requested, and when its layers ran."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from lckv_megatron.memory_plan.requests import Request

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Stretch:
    """A forward or a backward of one run of a layer."""

    name: str
    """Of what runs, for reports."""
    layer: int
    """From 1, of the whole model."""
    run: int
    """Number of the run in the program: its forward and its backward have the same."""
    direction: Direction
    start: int
    """Number of its first event."""
    end: int
    """Number of the first event behind it."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A program from its first event to the end of a step."""

    requests: list[Request]
    """All; what is never dropped ends with the trace."""
    stretches: list[Stretch]
    start: int
    """Number of the step's first event."""
    end: int
    """Number of the first event behind the step."""

    @property
    def persistent(self) -> int:
        """Bytes of what is there before and behind the step."""
        return sum(request.bytes for request in self.requests if self._stays(request))

    def step_requests(self) -> Iterator[Request]:
        """All that comes or goes in the step; what was there before comes with it."""
        for request in self.requests:
            if request.end > self.start and not self._stays(request):
                yield Request(request.bytes, max(request.start, self.start), request.end)

    def step_stretches(self) -> list[Stretch]:
        """Those of the step."""
        return [stretch for stretch in self.stretches if stretch.start >= self.start]

    def _stays(self, request: Request) -> bool:
        return request.start < self.start and request.end >= self.end
