"""The way of a micro-batch through stages gives what an uncut run gives, and each visit knows only what it
was sent, and what its own stage kept."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.sharing.execution import State, run_steps
from lckv.sharing.journey import Cargo, Journey, Visit, journey
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import LayerGroup, Step, iteration_plan
from lckv.sharing.visiting import Kept, Left, run_visit
from tests.lckv.sharing.maps import mixing_maps
from tests.lckv.sharing.toys import ToyLayers

Stage = int


class Traveller:
    """One micro-batch, and what lies on each stage for it."""

    def __init__(self, layer_types: LayerTypes, plan: tuple[Step, ...]) -> None:
        self.layers, self.plan = ToyLayers(layer_types), plan
        self.prepared: dict[tuple[Stage, LayerGroup], dict[int, Tensor]] = {}

    def travel(self, visits: tuple[Visit, ...]) -> Tensor | None:
        """All visits; the hidden states that leave the model."""
        state: State[Tensor] | None = State(self.layers.inputs, {})
        kept: dict[tuple[Stage, LayerGroup], Kept[Tensor]] = {}
        output: Tensor | None = None
        for visit in visits:
            assert state is not None
            if not visit.steps:
                assert visit.prepares is not None and state.previous is not None
                self.prepared[visit.stage, visit.prepares] = dict(state.previous)
                return None
            left = self._visit(visit, state, kept)
            output = left.state.hidden_states
            state = None if visit.sends is None else sent(left.state, visit.sends)
        return output

    def _visit(
        self, visit: Visit, state: State[Tensor], kept: dict[tuple[Stage, LayerGroup], Kept[Tensor]]
    ) -> Left[Tensor]:
        left = run_visit(
            self.plan,
            visit,
            self.layers,
            state,
            kept[visit.stage, visit.takes] if visit.takes else None,
            self.prepared.pop((visit.stage, visit.prepared)) if visit.prepared else None,
        )
        if visit.keeps is not None:
            assert left.kept is not None
            kept[visit.stage, visit.keeps] = left.kept
        if visit.prepares is not None:
            self.prepared[visit.stage, visit.prepares] = dict(left.prepared or {})
        return left


def sent(state: State[Tensor], cargo: Cargo) -> State[Tensor]:
    """Only what travels; numbers that do not are lost."""
    nothing = torch.full_like(state.hidden_states, float("nan"))
    return State(
        state.hidden_states if cargo.hidden else nothing,
        {layer: state.available[layer] for layer in cargo.available},
        None,
        {layer: (state.handed or {})[layer] for layer in cargo.handed},
        {layer: (state.previous or {})[layer] for layer in cargo.previous},
        lent={layer: (state.lent or {})[layer] for layer in cargo.lent},
    )


@st.composite
def journeys(draw: st.DrawFn) -> tuple[LayerTypes, tuple[Step, ...], Journey]:
    layer_types = draw(mixing_maps(9))
    plan = iteration_plan(layer_types, draw(st.integers(0, 2)), draw(st.integers(1, 3)))
    edges = sorted({0, *draw(st.sets(st.integers(1, len(layer_types)))), len(layer_types)})
    chunks = [range(start, stop) for start, stop in pairwise(edges)]
    return layer_types, plan, journey(plan, chunks, draw(st.integers(1, len(chunks))))


@given(journeys())
def test_a_micro_batch_arrives_as_if_nothing_were_cut(
    drawn: tuple[LayerTypes, tuple[Step, ...], Journey],
) -> None:
    layer_types, plan, way = drawn
    traveller = Traveller(layer_types, plan)
    with torch.no_grad():
        traveller.travel(way.prepare)
    output = traveller.travel(way.train)
    assert output is not None
    assert not traveller.prepared, "all that is prepared is used"
    whole = ToyLayers(layer_types)
    expected = run_steps(plan, whole, State(whole.inputs, {})).hidden_states
    assert torch.equal(output, expected)
    for mine, other in zip(traveller.layers.gradients(output), whole.gradients(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@given(journeys())
def test_no_pass_is_run_twice_with_gradient(drawn: tuple[LayerTypes, tuple[Step, ...], Journey]) -> None:
    _, plan, way = drawn
    trained = [
        (run.index, step.number) for visit in way.train for step in visit.steps for run in step.runs
        if step.requires_grad
    ]  # fmt: skip
    asked = [(run.index, step.number) for step in plan for run in step.runs if step.requires_grad]
    assert sorted(trained) == sorted(asked)


def test_a_map_that_points_downwards_visits_each_stage_once() -> None:
    plan = iteration_plan(LayerTypes.parse("0_0_2_2", 4), 7, 2)
    way = journey(plan, [range(2), range(2, 4)], 2)
    assert [visit.stage for visit in way.train] == [0, 1]
    assert not way.prepare and not way.circulates


def test_a_cyclic_group_within_a_stage_is_no_ring() -> None:
    plan = iteration_plan(LayerTypes.parse("0_1_3_3", 4), 7, 2)
    assert not journey(plan, [range(2), range(2, 4)], 2).circulates


def test_passes_go_around() -> None:
    plan = iteration_plan(LayerTypes.parse("0_2_2_3", 4), 1, 2)
    way = journey(plan, [range(2), range(2, 4)], 2)
    assert [visit.stage for visit in way.prepare] == [0, 1, 0]
    assert [visit.stage for visit in way.train] == [0, 1, 0, 1]
    assert way.train[1].sends == Cargo(hidden=False, previous=(2,), counts=False)
    assert way.train[2].sends == Cargo(hidden=True), "layer 3 reads nothing of others"
