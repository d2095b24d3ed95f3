import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import cyclic_sources, iteration_plan, layer_groups
from tests.golden.lckv_models import FOLDER

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


maps = st.integers(1, 20).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n))


@given(maps)
def test_groups_cover_all_layers_once_and_hold_what_their_cyclic_layers_read(sources: list[int]) -> None:
    layer_types = LayerTypes.parse("_".join(map(str, sources)), len(sources))
    groups = layer_groups(layer_types)
    assert [index for group in groups for index in range(group.start, group.stop)] == list(
        range(len(sources))
    )
    for group in groups:
        members = layer_types.layers[group.start : group.stop]
        assert group.iterated == any(layer.cyclic for layer in members)
        if group.iterated:
            assert all(layer.source < group.stop for layer in members)
            assert cyclic_sources(layer_types, group)[-1] == group.stop - 1, (
                "passes stop at the top layer's K/V projection"
            )
