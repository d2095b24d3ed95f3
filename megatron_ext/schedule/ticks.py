"""Which stage does what, when: the schedule of micro-batches that go around a ring of pipeline stages, as a
list.

A micro-batch is prepared, visit by visit, without gradient; then it goes forward through the visits that
train, and back through the same in reverse. A stage does one thing at a time. The list is made by playing the
step through: whenever a stage is free it does what ranks highest among that which is ready. Preparations of
later micro-batches so fill the gaps that training leaves. Two numbers bound the memory: micro-batches between
the beginning of their forward and the end of their backward, and micro-batches that are prepared and wait.
Every process makes the same list. (docs/pipelines.md) Neither torch nor Megatron is loaded.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate

from lckv.sharing.journey import Journey
from megatron_ext.model.placement import Placement


class Work(Enum):
    """What a stage does in a visit."""

    PREPARE = "prepare"
    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Leg:
    """A visit, as the schedule sees it."""

    stage: int

    cost: float
    """Time of its forward, in any unit; 0 for one that only receives."""


@dataclass(frozen=True)
class Tick:
    """A piece of work."""

    start: float
    end: float
    stage: int
    work: Work
    micro_batch: int

    visit: int
    """Number of the visit on the micro-batch's way."""


@dataclass(frozen=True)
class Message:
    """What a piece of work sends to another stage when it is done."""

    time: float
    source: int
    target: int
    work: Work
    """The work that it is for."""

    micro_batch: int
    visit: int


@dataclass(frozen=True)
class Bounds:
    """What a stage may hold at most."""

    in_flight: int
    """Micro-batches whose forward has begun and whose backward has not ended."""

    ahead: int
    """Micro-batches whose preparation has begun and whose forward has not."""


@dataclass(frozen=True)
class Ticks:
    """The schedule of one step."""

    stages: int
    ticks: tuple[Tick, ...]
    """By their ends, then by stage."""

    messages: tuple[Message, ...]
    """In the order in which they are sent, which is the same for every process."""

    @cached_property
    def length(self) -> float:
        """Time of the step."""
        return max((tick.end for tick in self.ticks), default=0.0)

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait, 0 .. 1; what uneven stages wait counts too."""
        busy = sum(tick.end - tick.start for tick in self.ticks)
        return 1 - busy / (self.length * self.stages) if self.length else 0.0

    @cached_property
    def in_flight(self) -> int:
        """The most micro-batches between the beginning of their forward and the end of their backward."""
        return self._most(lambda tick: tick.work is not Work.PREPARE)

    @cached_property
    def ahead(self) -> int:
        """The most micro-batches whose preparation has ended and whose forward has not begun."""
        begins: dict[int, float] = {}
        ends: dict[int, float] = {}
        for tick in self.ticks:
            if tick.work is Work.PREPARE:
                begins[tick.micro_batch] = max(begins.get(tick.micro_batch, 0.0), tick.end)
            elif tick.work is Work.FORWARD:
                ends[tick.micro_batch] = min(ends.get(tick.micro_batch, tick.start), tick.start)
        return _overlap([(begins[number], ends[number]) for number in begins])

    def _most(self, counts: Callable[[Tick], bool]) -> int:
        spans: dict[int, tuple[float, float]] = {}
        for tick in filter(counts, self.ticks):
            start, end = spans.get(tick.micro_batch, (tick.start, tick.end))
            spans[tick.micro_batch] = min(start, tick.start), max(end, tick.end)
        return _overlap(list(spans.values()))

    def of_stage(self, stage: int) -> list[Tick]:
        """What one stage does, in order."""
        mine = (tick for tick in self.ticks if tick.stage == stage)
        return sorted(mine, key=lambda tick: (tick.start, tick.end))


def _overlap(spans: Sequence[tuple[float, float]]) -> int:
    """The most of `spans` (start, end) that overlap; one that starts where another ends does not."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return max(accumulate(change for _, change in changes), default=0)


_PREPARE, _TRAIN = "begin to prepare", "begin to train"
_ORDERS: tuple[tuple[Work | str, ...], ...] = (
    (_TRAIN, Work.FORWARD, _PREPARE, Work.BACKWARD, Work.PREPARE),
    (Work.FORWARD, _PREPARE, Work.BACKWARD, Work.PREPARE, _TRAIN),
    (Work.FORWARD, Work.BACKWARD, Work.PREPARE, _PREPARE, _TRAIN),
    (Work.FORWARD, _TRAIN, Work.PREPARE, _PREPARE, Work.BACKWARD),
    (Work.PREPARE, Work.FORWARD, _PREPARE, _TRAIN, Work.BACKWARD),
    (Work.BACKWARD, Work.FORWARD, Work.PREPARE, _TRAIN, _PREPARE),
)
"""Rankings of ready work. None is best everywhere; the shortest schedule of all is taken."""

_ROUNDS = 8
"""Micro-batches per stage with which rankings are compared."""


def schedule(
    prepare: Sequence[Leg],
    train: Sequence[Leg],
    micro_batches: int,
    in_flight: int,
    *,
    backward_cost: float = 2.0,
    forward_only: bool = False,
) -> Ticks:
    """The shortest list known for `micro_batches` on these ways with at most `in_flight` of them between the
    beginning of their forward and the end of their backward.

    A backward costs `backward_cost` times its forward. Raises ValueError where a number is below 1.
    """
    for name, number in (("micro_batches", micro_batches), ("in_flight", in_flight)):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")
    stages = 1 + max(leg.stage for leg in train)
    backward = None if forward_only else backward_cost
    aheads = (stages, 2 * stages, 3 * stages) if prepare else (stages,)
    ways = [(ahead, order) for ahead in aheads for order in _ORDERS]

    def play(number: int, ahead: int, order: Sequence[Work | str]) -> list[Tick]:
        return _Play(prepare, train, number, Bounds(in_flight, ahead), order, backward).ticks()

    # which way is shortest shows after a few rounds
    few = min(micro_batches, _ROUNDS * stages)
    best_way = min(ways, key=lambda way: max(tick.end for tick in play(few, *way)))
    best = play(micro_batches, *best_way)
    legs = {Work.PREPARE: prepare, Work.FORWARD: train, Work.BACKWARD: train}
    return Ticks(stages, tuple(best), tuple(_messages(best, legs)))


def ticks_of(
    placement: Placement,
    way: Journey,
    micro_batches: int,
    in_flight: int | None,
    *,
    forward_only: bool = False,
) -> Ticks:
    """The schedule of a step; `in_flight` as `parallel.pipeline_in_flight`."""
    prepare, train = (
        tuple(Leg(visit.stage, placement.cost(visit)) for visit in visits)
        for visits in (way.prepare, way.train)
    )
    most = placement.in_flight_on(way, in_flight)
    return schedule(prepare, train, micro_batches, most, forward_only=forward_only)


def _messages(ticks: Sequence[Tick], legs: dict[Work, Sequence[Leg]]) -> Iterator[Message]:
    """One for each piece of work whose micro-batch goes on, in the same direction, on another stage."""
    for tick in ticks:
        way = legs[tick.work]
        visit = tick.visit + (-1 if tick.work is Work.BACKWARD else 1)
        if 0 <= visit < len(way) and way[visit].stage != tick.stage:
            yield Message(tick.end, tick.stage, way[visit].stage, tick.work, tick.micro_batch, visit)


_Key = tuple[Work, int, int]
"""Work, micro-batch, visit."""


class _Play:
    """One step, played through."""

    def __init__(
        self,
        prepare: Sequence[Leg],
        train: Sequence[Leg],
        micro_batches: int,
        bounds: Bounds,
        order: Sequence[Work | str],
        backward_cost: float | None,
    ) -> None:
        """`backward_cost` None: nothing goes backward."""
        self._legs = {Work.PREPARE: prepare, Work.FORWARD: train, Work.BACKWARD: train}
        self._micro_batches, self._bounds, self._backward_cost = micro_batches, bounds, backward_cost
        self._ranks = {what: rank for rank, what in enumerate(order)}
        stages = 1 + max(leg.stage for leg in (*prepare, *train))
        self._ready: list[list[_Key]] = [[] for _ in range(stages)]
        self._free = [True] * stages
        self._running: list[tuple[float, int, float, _Key]] = []  # end, stage, start, what
        self._next_prepare = 0 if prepare else micro_batches
        self._prepared = set() if prepare else set(range(micro_batches))
        self._next_train = self._in_flight = 0

    def ticks(self) -> list[Tick]:
        """All of them, by their ends, then by stage."""
        done: list[Tick] = []
        now = 0.0
        while self._begin(now):
            now = self._running[0][0]
            while self._running and self._running[0][0] == now:
                end, stage, start, (work, micro_batch, visit) = heapq.heappop(self._running)
                done.append(Tick(start, end, stage, work, micro_batch, visit))
                self._free[stage] = True
                self._finish(work, micro_batch, visit)
        return done

    def _begin(self, now: float) -> bool:
        """Give every free stage something to do; whether anything runs."""
        for stage, free in enumerate(self._free):
            candidates = [*self._ready[stage], *self._beginnings(stage)] if free else []
            if not candidates:
                continue
            key = min(candidates, key=self._rank)
            work, _, visit = key
            if key in self._ready[stage]:
                self._ready[stage].remove(key)
            elif work is Work.PREPARE:
                self._next_prepare += 1
            else:
                self._next_train += 1
                self._in_flight += 1
            cost = self._legs[work][visit].cost
            if work is Work.BACKWARD:
                cost *= self._backward_cost or 0.0
            heapq.heappush(self._running, (now + cost, stage, now, key))
            self._free[stage] = False
        return bool(self._running)

    def _beginnings(self, stage: int) -> Iterator[_Key]:
        """Micro-batches that may enter here."""
        waiting = self._next_prepare - self._next_train
        if self._next_prepare < self._micro_batches and waiting < self._bounds.ahead:
            yield from self._entering(stage, Work.PREPARE, self._next_prepare)
        if self._next_train in self._prepared and self._in_flight < self._bounds.in_flight:
            yield from self._entering(stage, Work.FORWARD, self._next_train)

    def _entering(self, stage: int, work: Work, micro_batch: int) -> Iterator[_Key]:
        if self._legs[work][0].stage == stage:
            yield work, micro_batch, 0

    def _rank(self, key: _Key) -> tuple[int, int, int]:
        work, micro_batch, visit = key
        begins = {Work.PREPARE: _PREPARE, Work.FORWARD: _TRAIN}.get(work) if visit == 0 else None
        return self._ranks[begins or work], micro_batch, visit

    def _finish(self, work: Work, micro_batch: int, visit: int) -> None:
        """What follows a piece of work."""
        legs = self._legs[work]
        if work is Work.BACKWARD:
            if visit:
                self._ready[legs[visit - 1].stage].append((work, micro_batch, visit - 1))
            else:
                self._in_flight -= 1
        elif visit + 1 < len(legs):
            self._ready[legs[visit + 1].stage].append((work, micro_batch, visit + 1))
        elif work is Work.PREPARE:
            self._prepared.add(micro_batch)
        elif self._backward_cost is None:
            self._in_flight -= 1
        else:
            self._ready[legs[visit].stage].append((Work.BACKWARD, micro_batch, visit))
