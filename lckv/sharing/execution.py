"""Runs the layers of a sharing map by its plan, whatever the layers are made of.

Keys and values are arguments and results, never state: recompute, several micro-batches in flight, pipeline
stages and caches cannot mix them up, and a source that is missing is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import LayerGroup, cyclic_sources

KV = TypeVar("KV")
"""What readers of a layer get: its keys and values, and whatever goes with them."""

Converged = Callable[[Mapping[int, KV], Mapping[int, KV]], bool]
"""Whether the keys and values of one pass differ so little from those of the pass before that iterating may
end."""


class Layers(Protocol[KV]):
    """The layers of one model or pipeline stage, for one micro-batch. Hidden states have any layout."""

    def run(
        self, index: int, hidden_states: Tensor, source: KV | None, *, kept: bool
    ) -> tuple[Tensor, KV | None]:
        """The whole layer. `source` is what it reads, None where it reads its own. Returns its hidden states
        and what it computes for readers, if anything. `kept`: this is the pass whose results count."""
        ...

    def keys_values(self, index: int, hidden_states: Tensor) -> KV:
        """What the layer computes for readers, and nothing else."""
        ...

    def run_without_source(self, index: int, hidden_states: Tensor) -> tuple[Tensor, KV | None]:
        """A cyclic layer in the first pass over its group, when the keys and values that it reads are zeros;
        as `run`."""
        ...

    def zeros(self, hidden_states: Tensor) -> KV:
        """Keys and values before the first pass."""
        ...


class Outcome(NamedTuple, Generic[KV]):
    """What running a group leaves."""

    hidden_states: Tensor

    available: dict[int, KV]
    """What layers above the group read, by the layer that computed it."""

    passes: int
    """Passes that were run."""


@dataclass(frozen=True)
class PlanRunner(Generic[KV]):
    """How the groups of a map are run."""

    layer_types: LayerTypes
    forward_passes: int
    """m: passes without gradient."""
    backward_passes: int
    """b >= 1: passes with gradient; the last one's results count."""
    converged: Converged[KV] | None = None
    """Asked after each pass but the first and the last; where it says so, the next pass is the last."""

    def run(
        self, group: LayerGroup, layers: Layers[KV], hidden_states: Tensor, available: Mapping[int, KV]
    ) -> Outcome[KV]:
        """Run one group on what the layers below have left."""
        previous: dict[int, KV] | None = None
        used = 1
        if group.iterated:
            for number in range(self.forward_passes + self.backward_passes - 1):
                with torch.no_grad() if number < self.forward_passes else nullcontext():
                    start = hidden_states if torch.is_grad_enabled() else hidden_states.detach()
                    current = self._prepare(group, layers, start, available, previous)
                used += 1
                done = (
                    previous is not None and self.converged is not None and self.converged(previous, current)
                )
                previous = current
                if done:
                    break
            if previous is None:
                previous = dict.fromkeys(cyclic_sources(self.layer_types, group), layers.zeros(hidden_states))
        hidden_states, left = self._run(group, layers, hidden_states, available, previous)
        return Outcome(hidden_states, left, used)

    def _prepare(
        self,
        group: LayerGroup,
        layers: Layers[KV],
        hidden_states: Tensor,
        available: Mapping[int, KV],
        previous: Mapping[int, KV] | None,
    ) -> dict[int, KV]:
        """One pass that stops at the keys and values of the highest layer that cyclic layers read; returns
        theirs.

        `previous` None is the first pass.
        """
        current: dict[int, KV] = {}
        for index in range(group.start, group.stop - 1):
            if self.layer_types[index].cyclic and previous is None:
                hidden_states, own = layers.run_without_source(index, hidden_states)
            else:
                source = source_of(self.layer_types, index, {**available, **current}, previous)
                hidden_states, own = layers.run(index, hidden_states, source, kept=False)
            if own is not None:
                current[index] = own
        top = group.stop - 1
        current[top] = layers.keys_values(top, hidden_states)
        return {index: current[index] for index in cyclic_sources(self.layer_types, group)}

    def _run(
        self,
        group: LayerGroup,
        layers: Layers[KV],
        hidden_states: Tensor,
        available: Mapping[int, KV],
        previous: Mapping[int, KV] | None,
    ) -> tuple[Tensor, dict[int, KV]]:
        """The pass whose results count. Keys and values are dropped as soon as no layer above reads them."""
        held = dict(available)
        for index in range(group.start, group.stop):
            source = source_of(self.layer_types, index, held, previous)
            hidden_states, own = layers.run(index, hidden_states, source, kept=True)
            if own is not None:
                held[index] = own
            held = {layer: kv for layer, kv in held.items() if self.layer_types.readers(layer)[-1] > index}
        return hidden_states, held


def source_of(
    layer_types: LayerTypes, index: int, available: Mapping[int, KV], previous: Mapping[int, KV] | None
) -> KV | None:
    """What layer `index` reads, from this pass or the previous one; None where it reads its own. Raises
    ValueError where it is missing."""
    kind = layer_types[index]
    if kind.source == index:
        return None
    pool = previous if kind.cyclic else available
    if pool is None or kind.source not in pool:
        raise ValueError(
            f"layer {index} reads the keys and values of layer {kind.source}, but "
            f"{'the previous pass' if kind.cyclic else 'this pass'} has those of {sorted(pool or ())}."
        )
    return pool[kind.source]


def run_groups(
    runner: PlanRunner[KV],
    groups: Sequence[LayerGroup],
    layers: Layers[KV],
    hidden_states: Tensor,
    available: Mapping[int, KV],
) -> Outcome[KV]:
    """Run several groups from the bottom; `passes` is the largest number of any of them."""
    outcome: Outcome[KV] = Outcome(hidden_states, dict(available), 1)
    for group in groups:
        ran = runner.run(group, layers, outcome.hidden_states, outcome.available)
        outcome = ran._replace(passes=max(ran.passes, outcome.passes))
    return outcome
