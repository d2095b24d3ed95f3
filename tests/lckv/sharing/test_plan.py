import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import (
    LayerGroup,
    LayerRun,
    Origin,
    Part,
    Read,
    crossing_sources,
    iteration_plan,
    layer_groups,
)
from tests.golden.lckv_models import FOLDER
from tests.lckv.sharing.maps import maps

RECORDED = json.loads((FOLDER / "plans.json").read_text())


@pytest.mark.parametrize(
    "entry",
    RECORDED["plans"] + RECORDED["variants"],
    ids=lambda entry: (
        f"{entry['layer_types']}-{entry.get('forward_passes', 7)}-{entry.get('backward_passes', 2)}"
    ),
)
def test_plans_are_those_of_the_official_code(entry: dict) -> None:
    layer_types = LayerTypes.parse(entry["layer_types"], entry["layer_types"].count("_") + 1)
    plan = iteration_plan(
        layer_types,
        entry.get("forward_passes", RECORDED["forward_passes"]),
        entry.get("backward_passes", RECORDED["backward_passes"]),
    )
    assert [[step.start, step.stop, step.requires_grad, step.update] for step in plan] == entry["plan"]


@pytest.mark.parametrize(("forward_passes", "backward_passes"), [(-1, 1), (0, 0)])
def test_impossible_passes(forward_passes: int, backward_passes: int) -> None:
    with pytest.raises(ValueError, match="at least 0 and at least 1"):
        iteration_plan(LayerTypes.plain(2), forward_passes, backward_passes)


@given(maps(), st.integers(0, 3), st.integers(1, 3))
def test_groups_cover_all_layers_once_and_hold_what_their_cyclic_layers_read(
    layer_types: LayerTypes, forward_passes: int, backward_passes: int
) -> None:
    groups = layer_groups(layer_types)
    assert [index for group in groups for index in range(group.start, group.stop)] == list(
        range(len(layer_types))
    )
    steps = iteration_plan(layer_types, forward_passes, backward_passes)
    assert tuple(dict.fromkeys(step.group for step in steps)) == groups
    for group in groups:
        members = layer_types.layers[group.start : group.stop]
        assert group.iterated == any(layer.cyclic for layer in members)
        if group.iterated:
            assert all(layer.source < group.stop for layer in members)
    for step in steps:
        assert step.update == (not step.hands)
        if step.hands:
            assert step.hands[-1] == step.group.stop - 1, "passes stop at the top layer's K/V projection"


def test_a_plan_in_full() -> None:
    """Layer 2 computes keys and values for layer 3 in the same pass, and for layer 1 in the next one."""
    steps = iteration_plan(LayerTypes.parse("0_3_0_3_2", 5), 1, 1)
    below, prepares, kept, above = steps
    assert below.group == LayerGroup(0, 1, iterated=False)
    assert below.runs == (LayerRun(0, Part.WHOLE, Read(Origin.OWN, 0, 0), True, False, ()),)
    assert (prepares.number, prepares.requires_grad, prepares.update, prepares.hands) == (
        0,
        False,
        False,
        (3,),
    )
    assert prepares.runs == (
        LayerRun(1, Part.WITHOUT_SOURCE, Read(Origin.ZEROS, 3, -1), False, False, ()),
        LayerRun(2, Part.WHOLE, Read(Origin.BELOW, 0, 0), True, False, (2,)),
        LayerRun(3, Part.KEYS_VALUES, None, True, True, (3,)),
    )
    assert (kept.number, kept.requires_grad, kept.update, kept.hands) == (1, True, True, ())
    assert kept.runs == (
        LayerRun(1, Part.WHOLE, Read(Origin.PREVIOUS_PASS, 3, 0), False, False, ()),
        LayerRun(2, Part.WHOLE, Read(Origin.BELOW, 0, 0), True, False, (0,)),
        LayerRun(3, Part.WHOLE, Read(Origin.OWN, 3, 1), True, False, (3,)),
    )
    assert above.runs == (LayerRun(4, Part.WHOLE, Read(Origin.BELOW, 2, 1), False, False, (2,)),)


def test_one_pass_reads_zeros() -> None:
    (step,) = iteration_plan(LayerTypes.parse("1_1", 2), 0, 1)
    assert step.runs[0] == LayerRun(0, Part.WHOLE, Read(Origin.ZEROS, 1, -1), False, False, ())


def test_passes_that_can_be_compared_with_one_before() -> None:
    steps = iteration_plan(LayerTypes.parse("1_1_2", 3), 2, 2)
    assert [step.compared for step in steps] == [False, True, True, False, False]


@given(maps(), st.integers(0, 3), st.integers(1, 3))
def test_what_a_pass_reads_is_there_and_nothing_else_is_held(
    layer_types: LayerTypes, forward_passes: int, backward_passes: int
) -> None:
    available: set[int] = set()
    for step in iteration_plan(layer_types, forward_passes, backward_passes):
        before = set(available)
        for run in step.runs:
            reads = run.reads
            if run.part is Part.WHOLE and reads is not None:
                assert reads.origin is not Origin.BELOW or reads.source in before
                assert reads.origin is not Origin.THIS_PASS or reads.source in available
            assert run.computes_kv == (run.index in layer_types.kv_layers)
            available |= {run.index} if run.computes_kv else set()
            available -= set(run.drops)
            if step.update:
                readers = {source: layer_types.readers(source)[-1] for source in available}
                assert all(reader > run.index for reader in readers.values())
        if not step.update:
            assert available == before, "a pass that prepares leaves nothing but what it hands on"
            assert set(step.hands) <= {run.index for run in step.runs if run.computes_kv}
    assert not available


def test_what_crosses() -> None:
    steps = iteration_plan(LayerTypes.parse("0_0_0_3_4_3_0_4", 8), 7, 2)
    assert [crossing_sources(steps, boundary) for boundary in range(9)] == [
        (), (0,), (0,), (0,), (0, 3), (0, 3, 4), (0, 4), (4,), (),
    ]  # fmt: skip


def test_what_crosses_within_a_group_depends_on_the_pass() -> None:
    """Layer 1 feeds layers 2 and 4; passes that prepare end below layer 4."""
    prepares, kept = iteration_plan(LayerTypes.parse("4_1_1_4_1", 5), 1, 1)
    assert [prepares.crossing(boundary) for boundary in range(6)] == [(), (), (1,), (), (), ()]
    assert [kept.crossing(boundary) for boundary in range(6)] == [(), (), (1,), (1,), (1,), ()]


@given(maps(8), st.data())
def test_pieces_of_a_list_are_the_list(layer_types: LayerTypes, data: st.DataObject) -> None:
    steps = iteration_plan(layer_types, 2, 1)
    boundary = data.draw(st.integers(0, len(layer_types)))
    below, above = (
        [piece for step in steps if (piece := step.cut(layers)) is not None]
        for layers in (range(boundary), range(boundary, len(layer_types)))
    )
    assert all(step.stop <= boundary for step in below)
    assert all(step.start >= boundary for step in above)
    assert sum(len(step.runs) for step in (*below, *above)) == sum(len(step.runs) for step in steps)
    assert all(
        [run.index for run in step.runs] == [*range(step.start, step.stop)] for step in (*below, *above)
    )
    assert [step.cut(range(boundary)) for step in below] == below
