"""The way of a micro-batch through pipeline stages: which steps of the plan each visit to a stage runs, and
what travels to the next.

A group whose layers lie on several stages is visited once per pass, so its passes go around these stages as
around a ring. A micro-batch travels twice. The first time it prepares: everything up to the last pass without
gradient runs, nothing is kept but the keys and values of the passes before those with gradient. The second
time it trains: passes without gradient of such groups are left out, for what they gave is there. Groups that
lie within one stage run inside a visit, with all their passes. A map without groups over several stages has
nothing to prepare, and one visit per stage.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from lckv.sharing.plan import LayerGroup, Origin, Step, crossing_lenders, crossing_sources


@dataclass(frozen=True)
class Cargo:
    """What travels from a visit to the next, beside sums of statistics. Layers are ascending."""

    hidden: bool
    """Hidden states; not at the end of a pass, since the next one starts from the group's input states."""

    available: tuple[int, ...] = ()
    """Layers whose keys and values of this pass, or below the group, are read further on."""

    handed: tuple[int, ...] = ()
    """Layers whose keys and values go to the next pass."""

    previous: tuple[int, ...] = ()
    """Layers whose keys and values of the pass before are read further on."""

    counts: bool = True
    """Whether the pass counts, and with it what the layers report."""

    lent: tuple[int, ...] = ()
    """Layers whose keys and values layers further on mix into their own."""


@dataclass(frozen=True)
class Visit:
    """What a stage does with a micro-batch between getting and sending it."""

    stage: int

    steps: tuple[Step, ...]
    """Pieces of steps, in order; none where prepared keys and values only arrive."""

    receives: Cargo | None
    """None: the micro-batch enters the model here."""

    sends: Cargo | None
    """None: it leaves here."""

    keeps: LayerGroup | None = None
    """The group over several stages whose input states, and what its layers read from below it,
    stay on this stage for the passes to come."""

    takes: LayerGroup | None = None
    """The group whose input states were kept by an earlier visit, for the pass that this visit begins."""

    prepares: LayerGroup | None = None
    """The group whose keys and values, which this visit received, are kept for training."""

    prepared: LayerGroup | None = None
    """The group whose kept keys and values this visit begins with."""


@dataclass(frozen=True)
class Journey:
    """Both ways of a micro-batch."""

    prepare: tuple[Visit, ...]
    """Without gradient; empty where nothing is to be prepared."""

    train: tuple[Visit, ...]

    @property
    def circulates(self) -> bool:
        """Whether the micro-batch comes to a stage more than once."""
        return bool(self.prepare) or len(self.train) > len({visit.stage for visit in self.train})


def journey(plan: Sequence[Step], chunks: Sequence[range], stages: int) -> Journey:
    """The visits of a micro-batch to `stages`, for `plan`. `chunks` are stretches of layers that follow each
    other; number i lies on stage i modulo `stages`."""
    starts = {layer: number for number, layers in enumerate(chunks) for layer in layers}
    crossing = {
        step.group
        for step in plan
        if step.group.iterated and starts[step.group.start] != starts[step.group.stop - 1]
    }
    train = [step for step in plan if step.requires_grad or step.group not in crossing]
    to_prepare = [i for i, step in enumerate(plan) if not step.requires_grad and step.group in crossing]
    first = {group: min(step.number for step in train if step.group == group) for group in crossing}
    walk = _Walk(plan, chunks, stages, first)
    prepare = plan[: to_prepare[-1] + 1] if to_prepare else ()
    return Journey(tuple(walk.visits(prepare, prepares=True)), tuple(walk.visits(train, prepares=False)))


class _Walk:
    """Cuts lists of steps into visits."""

    def __init__(
        self, plan: Sequence[Step], chunks: Sequence[range], stages: int, first: dict[LayerGroup, int]
    ) -> None:
        """`first`: of each group over several stretches, the first pass with gradient."""
        self._plan, self._chunks, self._stages, self._first = plan, chunks, stages, first

    def visits(self, steps: Sequence[Step], *, prepares: bool) -> Iterator[Visit]:
        """`steps` from beginning to end; with `prepares` the last visit only receives what was prepared."""
        pieces = [
            (number, piece)
            for step in steps
            for number, layers in enumerate(self._chunks)
            if (piece := step.cut(layers)) is not None
        ]
        visits = [  # by the number of the stretch
            (number, tuple(piece for _, piece in run))
            for number, run in groupby(pieces, lambda item: item[0])
        ]
        received: Cargo | None = None
        for place, (stage, run) in enumerate(visits):
            following = visits[place + 1][1][0] if place + 1 < len(visits) else None
            sent = self._cargo(run[-1], following, prepares=prepares)
            yield self._visit(stage, run, received, sent, prepares=prepares)
            received = sent
        if prepares and visits:
            group = visits[-1][1][-1].group
            home = next(number for number, layers in enumerate(self._chunks) if group.start in layers)
            yield Visit(home % self._stages, (), received, None, prepares=group)

    def _visit(
        self, stage: int, run: tuple[Step, ...], received: Cargo | None, sent: Cargo | None, *, prepares: bool
    ) -> Visit:
        keeps = takes = stores = uses = None
        for piece in run:
            group = piece.group
            if group not in self._first or not piece.begins:
                continue
            at_first = piece.number == (0 if prepares else self._first[group])
            keeps, takes = (group, takes) if at_first and not piece.update else (keeps, takes)
            takes = takes if at_first else group
            if self._first[group] and piece.number == self._first[group]:
                stores, uses = (group, uses) if prepares else (stores, group)
        return Visit(stage % self._stages, run, received, sent, keeps, takes, stores, uses)

    def _cargo(self, last: Step, following: Step | None, *, prepares: bool) -> Cargo | None:
        """What travels between two pieces on different stages."""
        whole = next(step for step in self._plan if (step.group, step.number) == (last.group, last.number))
        if last.ends and not last.update:
            if following is None and not prepares:
                return None
            return Cargo(hidden=False, previous=whole.hands, counts=False)
        if following is None:
            return None
        boundary = last.stop
        available, lent = set(whole.crossing(boundary)), set(whole.lent_across(boundary))
        handed: tuple[int, ...] = ()
        if last.update:
            available |= set(crossing_sources(self._plan, boundary))
            lent |= set(crossing_lenders(self._plan, boundary))
        else:
            handed = tuple(source for source in whole.hands if source < boundary)
        return Cargo(
            True,
            tuple(sorted(available)),
            handed,
            _read_from_before(whole, boundary),
            counts=last.update,
            lent=tuple(sorted(lent)),
        )


def _read_from_before(step: Step, boundary: int) -> tuple[int, ...]:
    """Layers whose keys and values of the pass before the step's layers at or above `boundary` read."""
    reads = (read for run in step.runs if run.index >= boundary for read in run.all_reads)
    return tuple(sorted({read.source for read in reads if read.origin is Origin.PREVIOUS_PASS}))
