"""Iteration plans: in which order, and how often, the layers of a sharing map run in training and parallel
evaluation.

Layers run from the bottom. A cyclic layer reads keys and values that a layer above it has yet to compute, so
it begins a group that extends to the highest layer referenced inside it. A group runs m passes without
gradient, then b with gradient, each from the group's input states: a cyclic layer reads the keys and values
of the previous pass (zeros before the first), every other layer those of the same pass. Layers outside groups
run once. (LCKV, Wu and Tu, ACL 2024, sections 3.1 and 3.2.)
"""

from dataclasses import dataclass

from lckv.sharing.layer_types import LayerTypes


@dataclass(frozen=True)
class LayerGroup:
    """Layers start .. stop - 1, which run together."""

    start: int
    stop: int

    iterated: bool
    """Whether the group holds cyclic layers and therefore runs m + b passes."""


@dataclass(frozen=True)
class Step:
    """One pass over the layers start .. stop - 1."""

    start: int
    stop: int

    requires_grad: bool
    """Whether gradients flow through this pass."""

    update: bool
    """Whether its hidden states and its keys and values are kept; otherwise it only serves the next pass."""


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


def cyclic_sources(layer_types: LayerTypes, group: LayerGroup) -> tuple[int, ...]:
    """Layers whose keys and values one pass over an iterated group hands to the next pass, ascending."""
    layers = layer_types.layers[group.start : group.stop]
    return tuple(sorted({layer.source for layer in layers if layer.cyclic}))


def iteration_plan(layer_types: LayerTypes, forward_passes: int, backward_passes: int) -> tuple[Step, ...]:
    """All passes of a map in order, for m = `forward_passes` >= 0 and b = `backward_passes` >= 1."""
    if forward_passes < 0 or backward_passes < 1:
        raise ValueError(
            f"forward_passes is {forward_passes} and backward_passes is {backward_passes}; "
            "they must be at least 0 and at least 1."
        )
    steps: list[Step] = []
    for group in layer_groups(layer_types):
        if not group.iterated:
            steps.append(Step(group.start, group.stop, requires_grad=True, update=True))
            continue
        passes = forward_passes + backward_passes
        steps += [
            Step(group.start, group.stop, requires_grad=number >= forward_passes, update=number == passes - 1)
            for number in range(passes)
        ]
    return tuple(steps)
