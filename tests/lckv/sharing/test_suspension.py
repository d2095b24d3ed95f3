"""A list of steps can be cut at any layer, also within an iterated group: what goes on from a state that was
handed over gives what an uncut run gives, bit for bit."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.sharing.execution import State, run_steps
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import Step, crossing_sources, iteration_plan
from tests.lckv.sharing.maps import maps
from tests.lckv.sharing.toys import ToyLayers


def uncut(layer_types: LayerTypes, steps: tuple[Step, ...]) -> tuple[Tensor, ...]:
    layers = ToyLayers(layer_types)
    output = run_steps(steps, layers, State(layers.inputs, {})).hidden_states
    return output.detach(), *layers.gradients(output)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@given(maps(9), st.integers(0, 2), st.integers(1, 2), st.data())
def test_a_run_goes_on_from_what_was_handed_over(
    layer_types: LayerTypes, m: int, b: int, data: st.DataObject
) -> None:
    """Stages of any sizes: each step runs on one stage after the other, and its state goes with it."""
    steps = iteration_plan(layer_types, m, b)
    boundaries = data.draw(st.sets(st.integers(1, len(layer_types))))
    edges = sorted({0, *boundaries, len(layer_types)})
    stages = [range(start, stop) for start, stop in pairwise(edges)]
    layers = ToyLayers(layer_types)
    state: State[Tensor] = State(layers.inputs, {})
    for piece in (step.cut(stage) for step in steps for stage in stages):
        if piece is not None:
            state = run_steps([piece], layers, State(**state._asdict()))
    found = state.hidden_states.detach(), *layers.gradients(state.hidden_states)
    assert_same(found, uncut(layer_types, steps))


def pipeline(layers: ToyLayers, steps: tuple[Step, ...], boundary: int) -> Tensor:
    """Two stages, each with a state of its own. Up go hidden states and the keys and values that cross; after
    a pass that prepares, down go those that the next one reads. The group's input stays where it is."""
    below: State[Tensor] = State(layers.inputs, {})
    above: State[Tensor] | None = None
    for step in steps:
        lower = step.cut(range(boundary))
        upper = step.cut(range(boundary, len(layers.layer_types)))
        available = below.available
        if lower is not None:
            below = run_steps([lower], layers, below)
        if upper is None:
            continue
        returns = lower is not None and not step.update
        if lower is not None or above is None:
            sources = step.crossing(boundary) if returns else crossing_sources(steps, boundary)
            sent = {source: below.available[source] for source in sources}
            above = (above or State(below.hidden_states, {}))._replace(
                hidden_states=below.hidden_states, available=sent
            )
        above = run_steps([upper], layers, above)
        if returns:
            previous = {**(below.handed or {}), **(above.previous or {})}
            below = below._replace(
                available=available, handed=None, previous=previous, prepared=step.number + 1
            )
    return below.hidden_states if above is None else above.hidden_states


@given(maps(9), st.integers(0, 2), st.integers(1, 2), st.data())
def test_two_stages_that_know_only_what_they_were_sent(
    layer_types: LayerTypes, m: int, b: int, data: st.DataObject
) -> None:
    steps = iteration_plan(layer_types, m, b)
    layers = ToyLayers(layer_types)
    output = pipeline(layers, steps, data.draw(st.integers(1, len(layer_types))))
    found = output.detach(), *layers.gradients(output)
    assert_same(found, uncut(layer_types, steps))


def test_a_pass_without_the_group_s_input_is_an_error() -> None:
    layer_types = LayerTypes.parse("0_2_2", 3)
    below, first, second = iteration_plan(layer_types, 1, 1)
    layers = ToyLayers(layer_types)
    state = run_steps([below, first], layers, State(layers.inputs, {}))
    with pytest.raises(
        ValueError,
        match=r"pass 1 over layers 1 to 2 starts from their input states, but state.start is None; hand over",
    ):
        run_steps([second], layers, state._replace(start=None))


def test_a_converged_run_stays_so_when_it_is_suspended() -> None:
    layer_types = LayerTypes.parse("1_1", 2)
    steps = iteration_plan(layer_types, 7, 1)
    layers = ToyLayers(layer_types)
    state: State[Tensor] = State(layers.inputs, {})
    for step in steps:
        state = run_steps([step], layers, state, lambda previous, handed: True)
    assert state.passes == 3
