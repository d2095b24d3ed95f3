"""Runs the list of steps of a sharing map, whatever the layers are made of.

Keys and values are arguments and results, never state: recompute, several micro-batches in flight, pipeline
stages and caches cannot mix them up, and a source that is missing is an error. What one step leaves for the
next is a value, `State`: a run can be suspended between any two steps,
or pieces of a step, and go on elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lckv.sharing.plan import LayerRun, Origin, Part, Read, Step

KV = TypeVar("KV")
"""What readers of a layer get: its keys and values, and whatever goes with them."""

Converged = Callable[[Mapping[int, KV], Mapping[int, KV]], bool]
"""Whether the keys and values of one pass differ so little from those
of the pass before that iterating may end."""


class Two(NamedTuple, Generic[KV]):
    """What a layer gets that reads two others."""

    first: KV
    second: KV


class Layers(Protocol[KV]):
    """The layers of one model or pipeline stage, for one micro-batch. Hidden states have any layout."""

    def run(
        self, index: int, hidden_states: Tensor, source: KV | Two[KV] | None, *, kept: bool
    ) -> tuple[Tensor, KV | None]:
        """The whole layer. `source` is what it takes of others: what it reads, None where it reads its own;
        of a layer that mixes others into its own, what the other lends. Returns its hidden states and what it
        computes for readers, if anything. `kept`: this is the pass whose results count."""
        ...

    def keys_values(self, index: int, hidden_states: Tensor) -> KV:
        """What the layer computes for readers, and nothing else."""
        ...

    def run_without_source(self, index: int, hidden_states: Tensor) -> tuple[Tensor, KV | None]:
        """A cyclic layer in the first pass over its group, when the keys and values
        that it reads are zeros; as `run`."""
        ...

    def zeros(self, hidden_states: Tensor) -> KV:
        """Keys and values before the first pass."""
        ...

    def first_guess(self, source: int, hidden_states: Tensor) -> KV:
        """In place of zeros, where the plan says so: what is guessed of the keys and values of layer `source`
        from the input states of its group. The passes send no gradient into it."""
        ...


@runtime_checkable
class WantingLayers(Layers[KV], Protocol[KV]):
    """Layers that can run a plan of `lckv.sharing.early_exit`."""

    def run_wanted(
        self, index: int, hidden_states: Tensor, source: KV | Two[KV] | None
    ) -> tuple[Tensor, KV | None]:
        """The layer for the wanted tokens alone, and its keys and values, if it computes any, for all; as
        `run` in the pass that counts. A layer that computes them is given the hidden states of all tokens,
        and those above it of the wanted ones."""
        ...


@runtime_checkable
class MixingLayers(Layers[KV], Protocol[KV]):
    """Layers that can run a plan in which some mix keys and values of others into their own."""

    def mixed_keys_values(self, index: int, hidden_states: Tensor, lent: KV) -> KV:
        """As `keys_values`, of a layer that mixes."""
        ...

    def lent(self, index: int) -> KV:
        """What layer `index`, which ran last, lends: its keys and values of each token alone, as the KV
        policy gets them. Asked once."""
        ...


class State(NamedTuple, Generic[KV]):
    """Everything that the remaining steps of a list need to know of those before."""

    hidden_states: Tensor
    """What the next layer gets. Between two passes over a group the next pass starts from `start` instead."""

    available: Mapping[int, KV]
    """What layers of the running pass, or above its group, read: by the layer that computed it."""

    start: Tensor | None = None
    """The input states of the group that is being iterated, while a pass is to come. Only the stage with the
    group's lowest layer needs them."""

    handed: Mapping[int, KV] | None = None
    """What the running pass has computed for the next one, by the layer that computed it."""

    previous: Mapping[int, KV] | None = None
    """What the pass before handed on, by the layer that computed it; before the first pass what was guessed,
    or None."""

    prepared: int = 0
    """Passes that have been run over the group that is being iterated."""

    converged: bool = False
    """Whether the remaining passes up to the one that counts are skipped."""

    passes: int = 1
    """The largest number of passes that were run over any group that is done."""

    lent: Mapping[int, KV] | None = None
    """What layers of the running pass, or below its group, lend to layers that mix it into their own keys and
    values: by the layer that computed it; None: nothing."""


def run_steps(
    steps: Sequence[Step], layers: Layers[KV], state: State[KV], converged: Converged[KV] | None = None
) -> State[KV]:
    """Run steps, or pieces of steps, one after the other.

    `converged` is asked after each pass but the first and the last; where it says so, the passes up to the
    last are skipped. Without it nothing here waits for the device. Raises ValueError where `state` lacks what
    a step needs.
    """
    for step in steps:
        if not state.converged or step.update:
            state = _run_step(step, layers, state, converged)
    return state


def _run_step(step: Step, layers: Layers[KV], state: State[KV], converged: Converged[KV] | None) -> State[KV]:
    if step.begins and step.guesses:  # with gradient, whatever the pass has: guesses are trained
        guesses = {source: layers.first_guess(source, state.hidden_states) for source in step.guesses}
        state = state._replace(previous=guesses)
    with nullcontext() if step.requires_grad else torch.no_grad():
        if step.begins and step.group.iterated:
            state = _begun(step, state)
        state = _run_layers(step, layers, state)
    if not step.ends:
        return state
    if step.update:
        passes = max(state.passes, state.prepared + 1)
        return State(state.hidden_states, state.available, passes=passes, lent=state.lent)
    handed = state.handed or {}
    settled = step.compared and converged is not None and converged(state.previous or {}, handed)
    return state._replace(
        hidden_states=state.hidden_states if state.start is None else state.start,
        handed=None,
        previous=handed,
        prepared=state.prepared + 1,
        converged=settled,
    )


def _begun(step: Step, state: State[KV]) -> State[KV]:
    """The state in which a pass over an iterated group starts: at the group's input states."""
    start = state.hidden_states if step.number == 0 else state.start
    if start is None:
        raise ValueError(
            f"pass {step.number} over layers {step.group.start} to {step.group.stop - 1} starts from their "
            "input states, but state.start is None; hand over the start of the pass before."
        )
    if step.update:
        return state._replace(hidden_states=start, start=None)
    hidden_states = start if torch.is_grad_enabled() else start.detach()
    return state._replace(hidden_states=hidden_states, start=start)


def _run_layers(step: Step, layers: Layers[KV], state: State[KV]) -> State[KV]:
    """The step's layers from the bottom."""
    hidden_states, available, handed = state.hidden_states, dict(state.available), dict(state.handed or {})
    lent = dict(state.lent or {})
    zeros: KV | None = None
    source: KV | Two[KV] | None
    own: KV | None
    for run in step.runs:
        if run.part is Part.NOTHING:
            own = None
        elif run.part is Part.KEYS_VALUES:
            own = _keys_values(run, layers, hidden_states, lent)
        elif run.part is Part.WANTED:
            assert isinstance(layers, WantingLayers), "the plan ends early for layers that cannot"
            source = _taken(run, available, state.previous, lent)
            hidden_states, own = layers.run_wanted(run.index, hidden_states, source)
        elif run.part is Part.WITHOUT_SOURCE:
            hidden_states, own = layers.run_without_source(run.index, hidden_states)
        else:
            if run.reads is not None and run.reads.origin is Origin.ZEROS:
                zeros = layers.zeros(hidden_states) if zeros is None else zeros
                source = zeros
            else:
                source = _taken(run, available, state.previous, lent)
            hidden_states, own = layers.run(run.index, hidden_states, source, kept=step.update)
        if own is not None:
            available[run.index] = own
            if run.hands:
                handed[run.index] = own
        for source_index in run.drops:
            available.pop(source_index, None)  # not there if its layer lies on a stage of somebody else's
        if run.lends and own is not None:
            lent[run.index] = _mixing(layers).lent(run.index)
        for lender in run.drops_lent:
            lent.pop(lender, None)
    return state._replace(hidden_states=hidden_states, available=available, handed=handed, lent=lent or None)


def _taken(
    run: LayerRun, available: Mapping[int, KV], previous: Mapping[int, KV] | None, lent: Mapping[int, KV]
) -> KV | Two[KV] | None:
    """What a layer that runs takes of others; None where it takes nothing."""
    return source_of(run, available, previous) if run.mixes is None else _lent_to(run, lent)


def _keys_values(run: LayerRun, layers: Layers[KV], hidden_states: Tensor, lent: Mapping[int, KV]) -> KV:
    """What a layer computes for readers alone."""
    if run.mixes is None:
        return layers.keys_values(run.index, hidden_states)
    return _mixing(layers).mixed_keys_values(run.index, hidden_states, _lent_to(run, lent))


def _mixing(layers: Layers[KV]) -> MixingLayers[KV]:
    assert isinstance(layers, MixingLayers), "the plan mixes for layers that cannot"
    return layers


def _lent_to(run: LayerRun, lent: Mapping[int, KV]) -> KV:
    """What a layer mixes into its own keys and values. Raises ValueError where it is missing."""
    assert run.mixes is not None
    if run.mixes not in lent:
        raise ValueError(
            f"layer {run.index} mixes the keys and values of layer {run.mixes} into its own, but there are "
            f"those of {sorted(lent)} to be mixed in."
        )
    return lent[run.mixes]


def source_of(
    run: LayerRun, available: Mapping[int, KV], previous: Mapping[int, KV] | None
) -> KV | Two[KV] | None:
    """What a layer reads, from this pass and below or from the previous pass; None where it reads its own.

    Raises ValueError where it is missing.
    """
    if run.reads is None or run.reads.origin is Origin.OWN:
        return None
    first, *second = (_read(run.index, reads, available, previous) for reads in run.all_reads)
    return Two(first, *second) if second else first


def _read(layer: int, reads: Read, available: Mapping[int, KV], previous: Mapping[int, KV] | None) -> KV:
    from_previous = reads.origin is Origin.PREVIOUS_PASS
    pool = previous if from_previous else available
    if pool is None or reads.source not in pool:
        raise ValueError(
            f"layer {layer} reads the keys and values of layer {reads.source}, but "
            f"{'the previous pass' if from_previous else 'this pass'} has those of {sorted(pool or ())}."
        )
    return pool[reads.source]
