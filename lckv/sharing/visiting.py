"""Runs a visit of a micro-batch to a pipeline stage (`lckv.sharing.journey`), whatever the layers are."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, NamedTuple

from torch import Tensor

from lckv.sharing.execution import KV, Layers, State, run_steps
from lckv.sharing.journey import Visit
from lckv.sharing.plan import Step, crossing_lenders, crossing_sources

Around = Callable[[Step], AbstractContextManager[object]]


class Kept(NamedTuple, Generic[KV]):
    """What stays on the stage where a group over several stages begins, for its next passes."""

    start: Tensor
    """The group's input states."""

    available: Mapping[int, KV]
    """Keys and values from below the group, by the layer that computed them."""

    lent: Mapping[int, KV]
    """What layers below the group lend, by the layer that computed it."""


class Left(NamedTuple, Generic[KV]):
    """What a visit leaves."""

    state: State[KV]
    """What goes on, or out of the model."""

    kept: Kept[KV] | None
    """For the further passes over the group that `Visit.keeps` names."""

    prepared: Mapping[int, KV] | None
    """For the first pass with gradient over the group that `Visit.prepares` names."""


def run_visit(
    plan: Sequence[Step],
    visit: Visit,
    layers: Layers[KV],
    arrived: State[KV],
    kept: Kept[KV] | None = None,
    prepared: Mapping[int, KV] | None = None,
    around: Around = lambda _step: nullcontext(),
) -> Left[KV]:
    """Run the steps of `visit`, a part of `plan`, each in the context `around`.

    `arrived`: what the visit before sent, or the model's input. `kept`: what an earlier visit to this stage
    left for the group that `Visit.takes` names, `prepared` the same for `Visit.prepared`.
    """
    state = arrived
    if visit.takes is not None:
        assert kept is not None
        state = State(kept.start, kept.available, kept.start, previous=arrived.previous, lent=kept.lent)
    keeps: Kept[KV] | None = None
    leaves: Mapping[int, KV] | None = None
    for step in visit.steps:
        if step.begins and step.requires_grad and step.group == visit.prepares:
            leaves = state.previous
        if step.begins and step.requires_grad and step.group == visit.prepared:
            state = state._replace(start=state.hidden_states, previous=prepared)
        if step.begins and step.group == visit.keeps:
            sources = crossing_sources(plan, step.group.start)
            lent = state.lent or {}
            keeps = Kept(
                state.hidden_states,
                {source: state.available[source] for source in sources},
                {lender: lent[lender] for lender in crossing_lenders(plan, step.group.start)},
            )
        with around(step):
            state = run_steps((step,), layers, state)
    return Left(state, keeps, leaves)
