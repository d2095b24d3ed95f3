"""The plan of a sharing map: one list of steps that says in which order, and how often, its layers run.

Layers run from the bottom. A cyclic layer reads keys and values that a layer above it has yet to compute, so
it begins a group that extends to the highest layer referenced inside it. A group runs m passes without
gradient, then b with gradient, each from the group's input states: a cyclic layer reads the keys and values
of the previous pass (zeros, or a learned first guess, before the first), every other layer those of the same
pass. Layers outside groups run once. (LCKV, Wu and Tu, ACL 2024, sections 3.1 and 3.2.)

The list is the only place that knows this rule. It is executed (`lckv.sharing.execution`), priced
(`lckv.cost`), remembered (`megatron_ext.model.memory`), drawn (`lckv.sharing.picture`) and cut short where
not all results are wanted (`lckv.sharing.early_exit`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from lckv.sharing.layer_types import LayerType, LayerTypes


@dataclass(frozen=True)
class LayerGroup:
    """Layers start .. stop - 1, which run together."""

    start: int
    stop: int

    iterated: bool
    """Whether the group holds cyclic layers and therefore runs m + b passes."""


class Part(Enum):
    """What of a layer a step runs."""

    WHOLE = "whole"

    KEYS_VALUES = "keys and values"
    """The layer's keys and values, and nothing else."""

    WITHOUT_SOURCE = "without source"
    """All but attention: the keys and values that the layer reads are zeros."""

    WANTED = "wanted"
    """The layer for wanted tokens alone; its keys and values, if it computes any, for all tokens."""

    NOTHING = "nothing"
    """The layer is left out."""


class Origin(Enum):
    """Where the keys and values come from that a layer reads."""

    OWN = "own"
    """The layer itself, in this pass."""

    THIS_PASS = "this pass"
    """A layer below it in its group, in this pass."""

    PREVIOUS_PASS = "previous pass"
    """A layer above it in its group, in the pass before; before the first pass the learned first guess."""

    BELOW = "below"
    """A layer below its group, in the pass that counts."""

    ZEROS = "zeros"
    """No layer: there is no pass before."""


class Read(NamedTuple):
    """Which keys and values a layer reads."""

    origin: Origin

    source: int
    """The layer that they belong to."""

    number: int
    """The pass over that layer's group that computes them, from 0; -1 for zeros and for the first guess."""


@dataclass(frozen=True)
class LayerRun:
    """What a step does with one layer."""

    index: int

    part: Part

    reads: Read | None
    """None where attention does not run because keys and values, or nothing at all, are wanted."""

    computes_kv: bool
    """Whether it computes keys and values."""

    hands: bool
    """Whether they go to the next pass."""

    drops: tuple[int, ...]
    """Layers whose keys and values nobody in this pass, or above the group where the pass counts, reads once
    this layer has run, ascending."""

    mixes: int | None = None
    """The layer below whose keys and values, of the same tokens, it mixes into its own; None: none."""

    lends: bool = False
    """Whether layers above mix its keys and values into their own."""

    drops_lent: tuple[int, ...] = ()
    """As `drops`, of what layers lend to be mixed in."""

    second: Read | None = None
    """What it reads besides, of another layer below it, where it reads two."""

    @property
    def all_reads(self) -> tuple[Read, ...]:
        """All that it reads."""
        return tuple(read for read in (self.reads, self.second) if read is not None)


@dataclass(frozen=True)
class Step:
    """One pass over the layers of a group, or the piece of it that a pipeline stage runs."""

    group: LayerGroup
    """The group that the pass belongs to."""

    start: int
    stop: int
    """The step's layers are start .. stop - 1; those of the group unless the step was cut."""

    number: int
    """Number of the pass over the group, from 0."""

    requires_grad: bool
    """Whether gradients flow through this pass."""

    update: bool
    """Whether the pass counts: its hidden states and its keys and values are kept. Otherwise it only prepares
    the next pass, and ends at the keys and values of the group's top layer."""

    runs: tuple[LayerRun, ...]
    """What is done with each layer, from the bottom."""

    guesses: tuple[int, ...] = ()
    """Layers whose keys and values are guessed from the group's input states before this pass, the first,
    ascending; none where it reads zeros."""

    @property
    def hands(self) -> tuple[int, ...]:
        """Layers whose keys and values go from this step to the next pass, ascending; none if it counts."""
        return tuple(run.index for run in self.runs if run.hands)

    @property
    def begins(self) -> bool:
        """Whether the step begins the pass, which then starts from the group's input states."""
        return self.start == self.group.start

    @property
    def ends(self) -> bool:
        """Whether the step ends the pass."""
        return self.stop == self.group.stop

    @property
    def compared(self) -> bool:
        """Whether the keys and values that the step hands on can be compared with those that it has read.
        Where they have converged, all steps up to the one that counts may be skipped."""
        return self.ends and not self.update and (self.number > 0 or bool(self.guesses))

    def crossing(self, boundary: int) -> tuple[int, ...]:
        """Layers below `boundary` whose keys and values the step's layers
        at or above it read in this pass, ascending."""
        reads = (read for run in self.runs if run.index >= boundary for read in run.all_reads)
        return tuple(sorted({read.source for read in reads if read.source < boundary}))

    def lent_across(self, boundary: int) -> tuple[int, ...]:
        """Layers below `boundary` whose keys and values the step's layers at or above it mix into their own,
        ascending."""
        mixed = {run.mixes for run in self.runs if run.index >= boundary and run.mixes is not None}
        return tuple(sorted(lender for lender in mixed if lender < boundary))

    def cut(self, layers: range) -> "Step | None":
        """The piece of the step that runs `layers`; None where it runs none of them."""
        start, stop = max(self.start, layers.start), min(self.stop, layers.stop)
        if start >= stop:
            return None
        runs = self.runs[start - self.start : stop - self.start]
        return replace(self, start=start, stop=stop, runs=runs)


def crossing_sources(steps: Sequence[Step], boundary: int) -> tuple[int, ...]:
    """Layers below `boundary` whose keys and values a layer at or above it reads,
    of those that are kept, ascending."""
    return tuple(sorted({source for step in steps if step.update for source in step.crossing(boundary)}))


def crossing_lenders(steps: Sequence[Step], boundary: int) -> tuple[int, ...]:
    """Layers below `boundary` whose keys and values a layer at or above it mixes into its own,
    of those that are kept, ascending."""
    return tuple(sorted({lender for step in steps if step.update for lender in step.lent_across(boundary)}))


def layer_groups(layer_types: LayerTypes) -> tuple[LayerGroup, ...]:
    """The groups of a map, from the bottom: iterated ones, and the acyclic stretches between them."""
    groups: list[LayerGroup] = []
    start = index = 0
    while index < len(layer_types):
        if not layer_types[index].cyclic:
            index += 1
            continue
        if start < index:
            groups.append(LayerGroup(start, index, iterated=False))
        start, top = index, layer_types[index].source
        while index <= top:
            top = max(top, layer_types[index].source)
            index += 1
        groups.append(LayerGroup(start, index, iterated=True))
        start = index
    if start < index:
        groups.append(LayerGroup(start, index, iterated=False))
    return tuple(groups)


def iteration_plan(
    layer_types: LayerTypes, forward_passes: int, backward_passes: int, *, first_guess: bool = False
) -> tuple[Step, ...]:
    """All steps of a map in order, for m = `forward_passes` and b = `backward_passes`. With `first_guess` the
    first pass over a group reads guessed keys and values, else zeros.

    Raises ValueError for m < 0 or b < 1.
    """
    if forward_passes < 0 or backward_passes < 1:
        raise ValueError(
            f"forward_passes is {forward_passes} and backward_passes is {backward_passes}; "
            "they must be at least 0 and at least 1."
        )
    steps: list[Step] = []
    kept_pass: dict[int, int] = {}
    for group in layer_groups(layer_types):
        last = forward_passes + backward_passes - 1 if group.iterated else 0
        kept_pass.update(dict.fromkeys(range(group.start, group.stop), last))
        walk = _GroupWalk(layer_types, group, last, kept_pass, first_guess=first_guess)
        steps += [
            walk.step(number, requires_grad=number >= forward_passes or not group.iterated)
            for number in range(last + 1)
        ]
    return tuple(steps)


class _GroupWalk:
    """The steps of one group."""

    def __init__(
        self,
        layer_types: LayerTypes,
        group: LayerGroup,
        last: int,
        kept_pass: dict[int, int],
        *,
        first_guess: bool,
    ) -> None:
        """`last`: number of the pass that counts; `kept_pass`:
        the same of each layer up to the group's top."""
        self._layer_types, self._group, self._last, self._kept_pass = layer_types, group, last, kept_pass
        self._layers = layer_types.layers[group.start : group.stop]
        self._hands = {layer.source for layer in self._layers if layer.cyclic}
        self._guesses = tuple(sorted(self._hands)) if first_guess else ()
        self._drops = {update: self._dropped(update=update) for update in (False, True)}
        self._drops_lent = {update: self._dropped_lent(update=update) for update in (False, True)}

    def step(self, number: int, *, requires_grad: bool) -> Step:
        """Pass `number` over the group."""
        update = number == self._last
        return Step(
            self._group,
            self._group.start,
            self._group.stop,
            number,
            requires_grad,
            update,
            tuple(self._run(layer, number) for layer in self._layers),
            () if number else self._guesses,
        )

    def _run(self, layer: LayerType, number: int) -> LayerRun:
        update = number == self._last
        part = Part.WHOLE
        if not update and layer.index == self._group.stop - 1:
            part = Part.KEYS_VALUES
        elif not update and layer.cyclic and self._reads_zeros(number):
            part = Part.WITHOUT_SOURCE
        reads = (
            []
            if part is Part.KEYS_VALUES
            else [self._read(layer, source, number) for source in layer.sources]
        )
        return LayerRun(
            layer.index,
            part,
            reads[0] if reads else None,
            layer.index in self._layer_types.kv_layers,
            not update and layer.index in self._hands,
            tuple(self._drops[update].get(layer.index, ())),
            layer.borrows,
            layer.index in self._layer_types.lenders,
            tuple(self._drops_lent[update].get(layer.index, ())),
            reads[1] if len(reads) > 1 else None,
        )

    def _read(self, layer: LayerType, source: int, number: int) -> Read:
        if source == layer.index:
            return Read(Origin.OWN, source, number)
        if layer.cyclic:
            origin = Origin.ZEROS if self._reads_zeros(number) else Origin.PREVIOUS_PASS
            return Read(origin, source, number - 1)
        if source < self._group.start:
            return Read(Origin.BELOW, source, self._kept_pass[source])
        return Read(Origin.THIS_PASS, source, number)

    def _reads_zeros(self, number: int) -> bool:
        return number == 0 and not self._guesses

    def _dropped(self, *, update: bool) -> dict[int, list[int]]:
        """By layer, whose keys and values a pass drops after it: in a pass that counts what no layer above
        reads, in another what it has computed and no layer up to the group's top reads."""
        top = self._group.stop - 1
        dropped: dict[int, list[int]] = {}
        for source in self._layer_types.kv_layers:
            readers = self._layer_types.readers(source)
            last = max([source, *(reader for reader in readers if update or reader < top)])
            if self._group.start <= last <= top and (update or source >= self._group.start):
                dropped.setdefault(last, []).append(source)
        return dropped

    def _dropped_lent(self, *, update: bool) -> dict[int, list[int]]:
        """As `_dropped`, of what layers lend. The group's top layer mixes in every pass."""
        top = self._group.stop - 1
        dropped: dict[int, list[int]] = {}
        for lender in self._layer_types.lenders:
            mixers = self._layer_types.mixers(lender)
            last = max([lender, *(mixer for mixer in mixers if update or mixer <= top)])
            if self._group.start <= last <= top and (update or lender >= self._group.start):
                dropped.setdefault(last, []).append(lender)
        return dropped
