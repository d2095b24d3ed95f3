"""Addresses for requests whose times are known, with the least peak: dynamic storage allocation, offline.

What is placed is a body: requests whose addresses are fixed relative to each other, or one request alone.
Two bodies conflict where requests of them are there at a time. Either the one lies below the other then, or
above: a binary number of an integer program, which minimises the peak (HiGHS through `scipy.optimize.milp`).

No peak is below that of the live bytes. First fit tries a few orders of the bodies; where the best of them
reaches that bound, it is the optimum, and no program runs. Neither does one with too many conflicts. Where
the program finds nothing better in its time, first fit's placement stays. The result says which it was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import gcd
from typing import Literal

import numpy as np

from lckv_megatron.memory_plan.requests import Request, live_peak

How = Literal["live peak reached", "integer program", "first fit"]
MOST_BODIES, MOST_CONFLICTS = 150, 1500
"""In an integer program; one with more is not tried."""


@dataclass(frozen=True, eq=False)
class Body:
    """Requests at fixed distances."""

    requests: tuple[Request, ...]
    offsets: tuple[int, ...]
    """Address of each, from the body's own."""
    ceiling: int | None = None
    """The body must end there at the latest, counted from address 0."""

    @staticmethod
    def of(request: Request, ceiling: int | None = None) -> "Body":
        """One request alone."""
        return Body((request,), (0,), ceiling)

    @cached_property
    def edges(self) -> np.ndarray:
        """int64 [4, requests]: start, end, lowest address, first address behind."""
        starts, ends, sizes = zip(*((r.start, r.end, r.bytes) for r in self.requests), strict=True)
        low = np.array(self.offsets, dtype=np.int64)
        return np.stack([np.array(starts), np.array(ends), low, low + np.array(sizes)])

    @property
    def bytes(self) -> int:
        """Height."""
        return int(self.edges[3].max())

    def distance(self, below: "Body") -> int | None:
        """How far above the address of `below` this one's must be to lie above; None without a conflict."""
        start, end, low, _ = self.edges
        their_start, their_end, _, their_high = below.edges
        both = (start[:, None] < their_end[None]) & (their_start[None] < end[:, None])
        return int((their_high[None] - low[:, None])[both].max()) if both.any() else None


@dataclass(frozen=True)
class Placement:
    """Addresses of bodies."""

    addresses: tuple[int, ...]
    peak: int
    bound: int
    """No placement has a lower peak: that of the live bytes, or what the integer program has proven of the
    orders in which bodies may lie."""
    how: How

    @property
    def gap(self) -> float:
        """Share of the peak by which the optimum may be lower."""
        return 1 - self.bound / self.peak if self.peak else 0.0


def place(bodies: Sequence[Body], *, seconds: float = 10.0) -> Placement:
    """The best placement that is found; the integer program takes at most so many seconds."""
    bound = live_peak(request for body in bodies for request in body.requests)
    best: _Packed | None = None
    for order in _orders(bodies):
        packed = _first_fit(bodies, order)
        if best is None or packed[1] < best[1]:
            best = packed
        if best[1] <= bound:
            return Placement(*best, bound, "live peak reached")
    assert best is not None
    better, proven = _program(bodies, best[1], bound, seconds)
    bound = max(bound, proven)
    if better is not None and better[1] < best[1]:
        return Placement(*better, min(bound, better[1]), "integer program")
    return Placement(*best, min(bound, best[1]), "integer program" if bound >= best[1] else "first fit")


def first_fit(bodies: Sequence[Body]) -> tuple[int, ...]:
    """Addresses, each body as low as those before it leave room."""
    return _first_fit(bodies, range(len(bodies)))[0]


_Packed = tuple[tuple[int, ...], int]
"""Addresses and peak."""


def _orders(bodies: Sequence[Body]) -> Iterator[list[int]]:
    """Bodies with a ceiling come first, in the order of time: what goes first lies on top. Tiny ones come
    last: a large one must not leave a hole for the sake of a tiny one below it."""
    tiny = max((body.bytes for body in bodies), default=0) / 100
    keys: tuple[Callable[[Body], tuple[int, ...]], ...] = (
        lambda body: (-_lifetime(body), -body.bytes),
        lambda body: (-_lifetime(body) * body.bytes,),
        lambda body: (-body.bytes, -_lifetime(body)),
        lambda body: (int(body.edges[0].min()), -body.bytes),
    )
    for key in keys:
        classes = [_limited(body) or (1, int(body.bytes < tiny), *key(body)) for body in bodies]
        yield sorted(range(len(bodies)), key=classes.__getitem__)


def _limited(body: Body) -> tuple[int, ...]:
    return () if body.ceiling is None else (0, int(body.edges[0].min()), -int(body.edges[1].max()))


def _lifetime(body: Body) -> int:
    return int(body.edges[1].max() - body.edges[0].min())


def _first_fit(bodies: Sequence[Body], order: Sequence[int]) -> _Packed:
    """Each body at the lowest address at which it conflicts with none of those before it."""
    addresses = [0] * len(bodies)
    placed = np.empty((4, sum(len(body.requests) for body in bodies)), dtype=np.int64)
    count = 0
    for number in order:
        edges = bodies[number].edges
        address = _lowest(edges, placed[:, :count])
        addresses[number] = address
        end = count + edges.shape[1]
        placed[:, count:end] = edges
        placed[2:, count:end] += address
        count = end
    return tuple(addresses), int(placed[3].max(initial=0))


def _lowest(edges: np.ndarray, placed: np.ndarray) -> int:
    """The lowest address for a body: outside of every open stretch in which a pair would overlap."""
    near = placed[:, (placed[0] < edges[1].max()) & (edges[0].min() < placed[1])]
    mine, theirs = np.nonzero((near[0] < edges[1][:, None]) & (edges[0][:, None] < near[1]))
    begins, ends = near[2][theirs] - edges[3][mine], near[3][theirs] - edges[2][mine]
    order = np.argsort(begins)
    reached = np.maximum.accumulate(np.concatenate([[0], ends[order]]))  # by the stretches before each
    free = np.append(begins[order] >= reached[:-1], True)
    return int(reached[free.argmax()])


def _program(bodies: Sequence[Body], known: int, bound: int, seconds: float) -> tuple[_Packed | None, int]:
    """A placement with a peak of at most `known`, and a bound that is proven; 0 where there is none."""
    if len(bodies) > MOST_BODIES:
        return None, 0
    conflicts = list(_conflicts(bodies))
    if len(conflicts) > MOST_CONFLICTS:
        return None, 0
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second: only programs wait

    unit = reduce(gcd, (int(number) for body in bodies for number in body.edges[2:].ravel()))
    number, pairs = len(bodies), len(conflicts)
    rows, limits = _rows(bodies, conflicts, known, unit)
    highest = [min(known, body.ceiling or known) - body.bytes for body in bodies]
    upper = np.array([*(most / unit for most in highest), *[1] * pairs, known / unit])
    lower = np.array([*[0] * (number + pairs), bound / unit])
    result = milp(
        np.array([*[0] * (number + pairs), 1]),
        integrality=np.array([*[0] * number, *[1] * pairs, 0]),
        bounds=Bounds(lower, upper),
        constraints=LinearConstraint(rows, -np.inf, limits),
        options={"time_limit": seconds},
    )
    proven = getattr(result, "mip_dual_bound", None)
    least = 0 if proven is None or not np.isfinite(proven) else int(np.ceil(proven - 1e-6) * unit)
    if result.x is None:
        return None, least
    above = result.x[number : number + pairs] > 0.5
    return _lowered(bodies, conflicts, above, known), least


_Conflict = tuple[int, int, int, int]
"""Two bodies, how far the first must be above the second, and the second above the first."""


def _conflicts(bodies: Sequence[Body]) -> Iterator[_Conflict]:
    for first, body in enumerate(bodies):
        for second in range(first):
            above = body.distance(bodies[second])
            if above is not None:
                below = bodies[second].distance(body)
                assert below is not None
                yield first, second, above, below


def _rows(
    bodies: Sequence[Body], conflicts: Sequence[_Conflict], known: int, unit: int
) -> tuple[object, np.ndarray]:
    """Rows of the program: addresses, then a binary number for each conflict (1: the first lies above), then
    the peak."""
    from scipy.sparse import coo_array

    number, pairs = len(bodies), len(conflicts)
    entries: list[tuple[int, int, float]] = []
    limits: list[float] = []

    def row(limit: float, *cells: tuple[int, float]) -> None:
        entries.extend((len(limits), column, value) for column, value in cells)
        limits.append(limit)

    for pair, (first, second, above, below) in enumerate(conflicts, number):
        most = known / unit
        row(most, (second, 1), (first, -1), (pair, above / unit + most))
        row(-below / unit, (first, 1), (second, -1), (pair, -below / unit - most))
    for place, body in enumerate(bodies):
        row(-body.bytes / unit, (place, 1), (number + pairs, -1))
    lines, columns, values = zip(*entries, strict=True)
    return coo_array((values, (lines, columns)), shape=(len(limits), number + pairs + 1)), np.array(limits)


def _lowered(
    bodies: Sequence[Body], conflicts: Sequence[_Conflict], firsts_above: np.ndarray, known: int
) -> _Packed | None:
    """Whole numbers from the program's floating ones: its order, and each body as low as that allows.

    None where rounding has made an order of which that is worse than `known`, or no order at all.
    """
    steps = [
        (second, first, above) if first_above else (first, second, below)
        for (first, second, above, below), first_above in zip(conflicts, firsts_above, strict=True)
    ]
    addresses = [0] * len(bodies)
    for _ in range(len(bodies) + 1):
        before = list(addresses)
        for lower, upper, distance in steps:
            addresses[upper] = max(addresses[upper], addresses[lower] + distance)
        if addresses == before:
            break
    tops = [address + body.bytes for address, body in zip(addresses, bodies, strict=True)]
    fits = all(top <= (body.ceiling or known) for top, body in zip(tops, bodies, strict=True))
    return (tuple(addresses), max(tops)) if addresses == before and fits else None
