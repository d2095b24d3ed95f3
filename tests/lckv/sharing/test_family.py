"""Families of sharing maps: what can be drawn, how often, and what is refused."""

from collections import Counter
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.config import CompressionConfig
from lckv.cost import ModelShape, layer_costs, training_cost
from lckv.errors import SettingError
from lckv.policies.dmc.config import DMCConfig
from lckv.sharing.family import LayerTypesFamily
from lckv.sharing.layer_types import LayerTypes

ROUTING = "0_0|1_1|2_2|3"
Alternatives = list[list[int]]


def text_of(alternatives: Alternatives) -> str:
    return "_".join("|".join(map(str, layer)) for layer in alternatives)


def alternatives(most_layers: int = 4) -> st.SearchStrategy[Alternatives]:
    """Of layers that read themselves or lower ones, and above the lowest two sometimes the top one."""

    def of_layer(index: int, layers: int) -> st.SearchStrategy[list[int]]:
        known = list(range(index + 1)) + ([layers - 1] if index < layers - 1 else [])
        return st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True)

    def of(layers: int) -> st.SearchStrategy[Alternatives]:
        return st.tuples(
            *(of_layer(index, layers) for index in range(layers - 1)), st.just([layers - 1])
        ).map(list)

    return st.integers(2, most_layers).flatmap(of)


def owner(chosen: tuple[int, ...], layer: int) -> int:
    """Whose keys and values a layer reads, of one alternative each."""
    return layer if chosen[layer] == layer else owner(chosen, chosen[layer])


def drawable(alternatives: Alternatives) -> Counter[str]:
    """How many draws come to each map, as the page of the module says."""
    return Counter(
        "_".join(str(owner(chosen, layer)) for layer in range(len(chosen)))
        for chosen in product(*alternatives)
    )


@given(alternatives(), st.integers(0, 2**31))
def test_a_family_is_what_can_be_drawn(written: Alternatives, seed: int) -> None:
    layers, draws = len(written), drawable(written)
    family = LayerTypesFamily.parse(text_of(written), layers)
    if family.only is not None:  # without a second alternative it is a map
        return
    assert str(family) == text_of(written)
    assert {str(one): share for one, share in family.weights.items()} == pytest.approx(
        {text: number / draws.total() for text, number in draws.items()}
    )
    assert next(iter(family.weights)) == family.first
    every = ("_".join(map(str, sources)) for sources in product(range(layers), repeat=layers))
    assert {text for text in every if LayerTypes.parse(text, layers) in family} == set(draws)
    assert {str(family.draw(seed, step)) for step in range(8)} <= set(draws)
    computing = {layer for one in family.weights for layer in one.kv_layers}
    assert set(family.stored.kv_layers) == computing
    assert family.any_sharing == (len(draws) > 1 or set(draws) != {str(LayerTypes.plain(layers))})


def test_draws_are_uniform_and_independent() -> None:
    family, steps = LayerTypesFamily.parse(ROUTING, 4), 4000
    drawn = [family.draw(1234, step) for step in range(steps)]
    assert drawn == [LayerTypesFamily.parse(ROUTING, 4).draw(1234, step) for step in range(steps)]
    counts = Counter(drawn)
    for one, share in family.weights.items():
        # five standard deviations of a binomial distribution
        deviation = (share * (1 - share) / steps) ** 0.5
        assert counts[one] / steps == pytest.approx(share, abs=5 * deviation)
    pairs = Counter(pairwise(drawn))
    assert len(pairs) == 64
    assert max(pairs.values()) < 1.8 * steps / 64, "a draw must not depend on the one before"
    other = [family.draw(1235, step) for step in range(steps)]
    same = sum(one == two for one, two in zip(drawn, other, strict=True)) / steps
    assert same == pytest.approx(1 / 8, abs=5 * (7 / 64 / steps) ** 0.5)
    listed = Counter(LayerTypesFamily.parse(["0_1", "0_0", "1_1"], 2).draw(7, step) for step in range(3000))
    assert all(900 < number < 1100 for number in listed.values())
    assert len(listed) == 3


def test_chains_end_where_keys_and_values_are_computed() -> None:
    family = LayerTypesFamily.parse("0_0|1_1|2_2s|3", 4)
    assert str(family.first) == "0_0_0_0s"
    assert str(family.stored) == "0_1_2_3"
    assert not family.any_cyclic
    # a list keeps the meaning that single maps have: layer 1 computes keys and values for layer 2
    listed = LayerTypesFamily.parse(["0_0_1", "0_0_2"], 3)
    assert str(listed.first) == "0_0_1"
    assert str(listed.stored) == "0_1_2"
    assert LayerTypes.parse("0_0_0", 3) not in listed


def test_both_ways_of_writing_a_list() -> None:
    text = LayerTypesFamily.parse("[0_1s_2, 0_0_2]", 3)
    assert text == LayerTypesFamily.parse(("0_1s_2", "0_0_2"), 3)
    assert str(text) == "[0_1s_2, 0_0_2]"
    assert text.any_sliding
    one = LayerTypesFamily.parse(["0_0_2"], 3)
    assert str(one) == "0_0_2"
    assert one == LayerTypesFamily.parse("0_0_2", 3)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("0_0|1", "it has 2 entries but the model has 3 layers: give one entry per layer"),
        ("0_0|1_1|", "entry 2 has the alternative without a text"),
        ("0_0|x_2", r"entry 1 has the alternative 'x': an alternative is the index of the layer"),
        ("0_0|7_2", "entry 1 may read layer 7, but the model has 3 layers, 0 to 2"),
        ("0_1|0|1_2", r"entry 1 is '1\|0\|1': it has an alternative twice"),
        ("0|2_1_0|2", "layers 0, 2 can draw each other in a circle"),
        ("0_0+1|1_2", r"a family has no entries of two layers \('\+' or '/'\): train such a map by itself"),
        (["0_0_2", "0_1_1/0"], "a family has no entries of two layers"),
        (["0_0_2", "0_0|1_2"], "it has alternatives and stands in a list"),
        (["0_0_2", "0_1_2", "0_0_2"], "layer_types is '0_0_2'; it stands in the list more than once"),
        (["0_0_2", "0_1"], "it has 2 entries but the model has 3 layers"),
        ([], r"the list is empty: give at least one map"),
        ("[]", r"the list is empty: give at least one map"),
        ("[0_0_2, 0_1_2", r"begins with a bracket, as a list of maps, and does not end with one: add '\]'"),
        ([0], "layer_types is '0'; it stands in the list and is no text"),
    ],
)
def test_what_is_no_family(written: str | list[str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        LayerTypesFamily.parse(written, 3)


def test_a_family_is_no_map() -> None:
    compression = CompressionConfig(layer_types=ROUTING)
    assert compression.problems(4) == []
    for ask in (compression.map, compression.plan):
        with pytest.raises(SettingError, match="here one map is needed: give one of them, such as 0_0_0_0"):
            ask(4)
    (problem,) = compression.problems_of_model(4)
    assert str(problem).startswith("layer_types is 0_0|1_1|2_2|3; it is a family of maps")
    assert CompressionConfig().problems_of_model(4) == []
    assert compression.chosen("0_0_2_2", 4).layer_types == "0_0_2_2"
    with pytest.raises(SettingError, match=r"layer_types is 0_0_1_3; it is no map of the family 0_0\|1"):
        compression.chosen("0_0_1_3", 4)
    for of_two in ("0_1+0_2_3", "0_1_1/0_3"):
        assert LayerTypes.parse(of_two, 4) not in LayerTypesFamily.parse("0_0|1_1|2_3", 4)
    with pytest.raises(SettingError, match="it is not the model's map, 0_0_2_2"):
        CompressionConfig(layer_types="0_0_2_2").chosen("0_1_2_3", 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"layer_types": "0_0s|1_2"},
            "layers are marked with 's' but sliding_window is not set",
        ),
        ({"layer_types": "0_0|1_2", "sliding_window": 4}, "no layer of 0_0|1_2 is marked with 's'"),
        (
            {"layer_types": "0|2_1_2", "first_guess": True},
            "layer_types is a family of maps, 0|2_1_2, in each of which other layers are iterated",
        ),
        (
            {"layer_types": ("0_2_2", "0_1_2"), "agreement_loss_coefficient": 0.5},
            "in each of which other layers are iterated: leave the former out, or choose one map",
        ),
        (
            {"layer_types": "0_0s|1_2", "sliding_window": 4, "policy": DMCConfig()},
            "the policy dmc cannot live with sliding windows",
        ),
    ],
)
def test_settings_that_do_not_fit_a_family(settings: dict, said: str) -> None:
    problems = [str(problem) for problem in CompressionConfig(**settings).problems(3)]
    assert any(said in problem for problem in problems), problems


def test_a_window_is_left_out_where_no_layer_has_one() -> None:
    family = CompressionConfig(layer_types="0_0s|1_2", sliding_window=4)
    assert family.chosen("0_0s_2", 3).sliding_window == 4
    assert family.chosen("0_1_2", 3).sliding_window is None


SHAPE = ModelShape(
    num_layers=4, hidden_size=64, ffn_size=128, query_heads=8, kv_heads=4, head_dim=8, vocab_size=97,
    seq_length=32,
)  # fmt: skip


@pytest.mark.parametrize("layer_types", [ROUTING, ("0_2_2_3", "0_1_2_3"), "0_2|1_2_2|3"])
def test_a_step_costs_the_mean_over_the_maps(layer_types: str | tuple[str, ...]) -> None:
    family = CompressionConfig(layer_types=layer_types, forward_passes=2)
    maps = family.maps(4)
    assert sum(maps.values()) == pytest.approx(1)
    assert all(one.problems_of_model(4) == [] for one in maps)
    for recomputed in (0, 2):
        costs = {one: training_cost(SHAPE, one, recomputed_layers=recomputed) for one in maps}
        mean = training_cost(SHAPE, family, recomputed_layers=recomputed)
        for name in ("model_flops", "hardware_flops"):
            expected = sum(share * getattr(costs[one], name) for one, share in maps.items())
            assert getattr(mean, name) == pytest.approx(expected)
    heaviest = family.heaviest(4)
    assert training_cost(SHAPE, heaviest).model_flops == max(
        training_cost(SHAPE, one).model_flops for one in maps
    )
    of_maps = [(share, layer_costs(SHAPE, one)) for one, share in maps.items()]
    expected_kv = [sum(share * costs[layer].keys_values for share, costs in of_maps) for layer in range(4)]
    assert [cost.keys_values for cost in layer_costs(SHAPE, family)] == pytest.approx(expected_kv)


def test_the_costs_of_a_large_family_are_estimated() -> None:
    layers = 20
    text = "_".join(["0", *(f"{index - 1}|{index}" for index in range(1, layers))])
    family = LayerTypesFamily.parse(text, layers)
    assert family.number_of_draws == 2**19
    assert not family.is_enumerated
    assert sum(family.weights.values()) == pytest.approx(1)
    computing = sum(share * len(one.kv_layers) for one, share in family.weights.items())
    assert computing == pytest.approx(1 + 19 / 2, abs=1)
    assert str(family.first) == "_".join("0" * layers)
