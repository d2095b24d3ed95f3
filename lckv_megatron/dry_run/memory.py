"""What lies in a rank's memory during a step, by kind, from the record of storages.

- parameters: the weights that the model computes with
- gradients: the sums that data parallelism reduces
- optimizer: main weights and moments
- activations: made by a forward and kept after it, for backward or for another stage
- temporary: everything else
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Kind = Literal["parameters", "gradients", "optimizer", "activations", "temporary"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass
class Phase:
    """A stretch of the program: building, forward or backward of a micro-batch, what lies between."""

    kind: str
    start: int
    end: int | None = None
    """Number of the first event behind it."""


@dataclass(slots=True)
class Allocation:
    """A storage from the event of its birth to that of its end."""

    bytes: int
    start: int
    start_seconds: float
    phase: int
    """Number of the phase in which it was made."""
    end: int | None = None
    end_seconds: float = 0.0
    kind: Kind | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """Bytes by kind over time."""

    seconds: np.ndarray
    """[n], ascending."""
    bytes: np.ndarray
    """int64 [kinds, n], in the order of KINDS."""

    @property
    def peak(self) -> dict[Kind, int]:
        """By kind, at the moment at which most bytes are taken."""
        at = int(self.bytes.sum(0).argmax())
        return {kind: int(number) for kind, number in zip(KINDS, self.bytes[:, at], strict=True)}

    @property
    def most(self) -> dict[Kind, int]:
        """The most of each kind, at whichever moment."""
        return {kind: int(numbers.max()) for kind, numbers in zip(KINDS, self.bytes, strict=True)}

    @property
    def peak_bytes(self) -> int:
        """The most at a time."""
        return int(self.bytes.sum(0).max())


def curve(allocations: Sequence[Allocation], phases: Sequence[Phase], start: int, end: int) -> Curve:
    """From event `start` to event `end`. Storages without a kind get theirs from the phases."""
    forward_ends = np.array([phase.end for phase in phases if phase.kind == "forward" and phase.end])
    index = {kind: number for number, kind in enumerate(KINDS)}
    events: list[tuple[int, float, int, int]] = []
    base = [0] * len(KINDS)
    for allocation in allocations:
        stop = end if allocation.end is None else allocation.end
        if stop <= start or allocation.start >= end:
            continue
        row = index[allocation.kind or _kind(allocation, phases, forward_ends)]
        if allocation.start < start:
            base[row] += allocation.bytes
        else:
            events.append((allocation.start, allocation.start_seconds, row, allocation.bytes))
        if stop < end:
            events.append((stop, allocation.end_seconds, row, -allocation.bytes))
    events.sort()
    changes = np.zeros((len(KINDS), len(events) + 1), dtype=np.int64)
    changes[:, 0] = base
    for place, (_, _, row, change) in enumerate(events, 1):
        changes[row, place] = change
    times = [seconds for _, seconds, _, _ in events]
    return Curve(np.array([times[0] if times else 0.0, *times]), changes.cumsum(1))


def _kind(allocation: Allocation, phases: Sequence[Phase], forward_ends: np.ndarray) -> Kind:
    if phases[allocation.phase].kind not in ("forward", "schedule"):
        return "temporary"
    following = forward_ends[np.searchsorted(forward_ends, allocation.start) :]
    kept = len(following) and (allocation.end is None or allocation.end > following[0])
    return "activations" if kept else "temporary"
