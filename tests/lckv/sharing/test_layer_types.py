import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.sharing.layer_types import LayerTypes
from tests.golden.lckv_models import FOLDER

RECORDED = json.loads((FOLDER / "plans.json").read_text())


@pytest.mark.parametrize("entry", RECORDED["plans"], ids=lambda entry: entry["layer_types"])
def test_maps_mean_what_the_official_code_says(entry: dict) -> None:
    parsed = LayerTypes.parse(entry["layer_types"], entry["num_layers"])
    assert parsed.any_cyclic == entry["any_cyclic"]
    assert parsed.any_sliding == entry["any_sliding"]
    for layer, recorded in zip(parsed, entry["layers"], strict=True):
        assert layer.source == recorded["attends_to"]
        assert layer.cyclic == recorded["attends_top"]
        assert layer.sliding == recorded["sliding"]
        assert (layer.index in parsed.kv_layers) == recorded["computes_kv"]


@pytest.mark.parametrize("entry", RECORDED["invalid"], ids=lambda entry: repr(entry["layer_types"]))
def test_what_the_official_code_rejects_is_rejected(entry: dict) -> None:
    with pytest.raises(ValueError, match=r"^layer_types is"):
        LayerTypes.parse(entry["layer_types"], entry["num_hidden_layers"])


@pytest.mark.parametrize(
    ("text", "num_layers", "said"),
    [
        ("0_1t_2", 3, r"entry 1 \(character 3\) is '1t': an entry is the index of the layer"),
        ("0_1_", 3, r"entry 2 \(character 5\) is empty"),
        ("0_1_5", 3, r"entry 2 \(character 5\) reads layer 5, but the model has 3 layers, 0 to 2"),
        ("0_1_2_3", 5, "has 4 entries but the model has 5 layers"),
        ("0_-1", 2, r"entry 1 \(character 3\) is '-1'"),
        ("0_1+1", 2, "entry 1 is '1\\+1', but layer 1 is not below layer 1"),
        ("0_1+2_2", 3, "entry 1 is '1\\+2', but layer 2 is not below layer 1"),
        (
            "0_0_2+1_3",
            4,
            "entry 2 is '2\\+1', but layer 1 computes no keys and values: choose .* that does, 0\\.$",
        ),
        ("2_1+0_2", 3, "entry 1 is '1\\+0', but layer 0 computes no keys and values: leave it out"),
        ("0_1_1/2_3", 4, "entry 2 is '1/2', but layer 2 is not below layer 2, .*: choose a layer below"),
        ("0_1_3+0_3", 4, "entry 2 is '3\\+0', but layer 3 is not below layer 2"),
        ("0_1_2/0", 3, "entry 2 is '2/0', but a layer that reads its own keys .*: write 2, or 2\\+0 to mix"),
        ("0_1_1/1", 3, "entry 2 is '1/1', but both are layer 1: write 1"),
        ("0_1_1+1", 3, "entry 2 is '1\\+1', but both are layer 1: write 1"),
        ("0_0_1/0", 3, "entry 2 is '1/0', but layer 1 computes no keys and values: .* that does, 0\\.$"),
        ("0_0_0/1", 3, "entry 2 is '0/1', but layer 1 computes no keys and values"),
        ("0_0s_2s_2+0s", 4, "caches keep the window of layer 2 and every token of layer 0: let layers with"),
        ("0_0s_2s_0/2s", 4, "caches keep the window of layer 2 and every token of layer 0"),
        ("0_1_1-0", 3, "entry 2 .* i\\+j for a mixture of the keys and values of layers i and j, or i/j"),
        ("0_+0", 2, "entry 1 .character 3. is '\\+0'"),
    ],
)
def test_the_error_says_where_and_why(text: str, num_layers: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LayerTypes.parse(text, num_layers)


def test_no_map_is_the_plain_map() -> None:
    assert str(LayerTypes.parse(None, 4)) == "0_1_2_3"


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.lists(st.tuples(st.integers(0, n - 1), st.booleans()), min_size=n, max_size=n)
    )
)
def test_text_round_trip(entries: list[tuple[int, bool]]) -> None:
    text = "_".join(f"{source}{'s' * sliding}" for source, sliding in entries)
    parsed = LayerTypes.parse(text, len(entries))
    assert str(parsed) == text
    assert sorted(reader for source in parsed.kv_layers for reader in parsed.readers(source)) == list(
        range(len(entries))
    )


def test_layers_that_mix() -> None:
    parsed = LayerTypes.parse("0s_1+0s_2+1_2", 4)
    assert str(parsed) == "0s_1+0s_2+1_2"
    assert [layer.mixes for layer in parsed] == [None, 0, 1, None]
    assert (parsed.lenders, parsed.mixers(0), parsed.readers(2)) == ((0, 1), (1,), (2, 3))
    assert not parsed.is_plain and not LayerTypes.parse("0_1+0", 2).is_plain
    assert LayerTypes.plain(2).is_plain and LayerTypes.parse("0s_1", 2).is_plain


def test_layers_that_read_two() -> None:
    parsed = LayerTypes.parse("0s_1+0s_2_1/0s_4_4/2_1+0s", 7)
    assert str(parsed) == "0s_1+0s_2_1/0s_4_4/2_1+0s"
    assert [layer.sources for layer in parsed] == [(0,), (1,), (2,), (1, 0), (4,), (4, 2), (1, 0)]
    assert [layer.borrows for layer in parsed] == [None, 0, *[None] * 5]


@pytest.mark.parametrize(
    ("layer_types", "factor", "said"),
    [
        ("0_1+0", 0.0, "mix_scaling_factor is 0.0; it must be above 0, and finite"),
        ("0_1+0", float("inf"), "mix_scaling_factor is inf; it must be above 0"),
        ("0_0", 2.0, "mix_scaling_factor is 2.0; no layer of 0_0 mixes .*: leave it out, or write i"),
    ],
)
def test_a_scaling_factor_that_cannot_be(layer_types: str, factor: float, said: str) -> None:
    (problem,) = CompressionConfig(layer_types=layer_types, mix_scaling_factor=factor).problems(2)
    assert re.match(said, str(problem))


def test_layers_that_only_windowed_layers_read() -> None:
    assert LayerTypes.parse("0s_1s_2s_3_3_3", 6).windowed_kv_layers == (0, 1, 2)
    assert LayerTypes.parse("0s_0_2_2s", 4).windowed_kv_layers == ()
    assert LayerTypes.parse("0_2s_2s_3", 4).windowed_kv_layers == (2,)
    assert CompressionConfig(layer_types="0_2s_2s_3", sliding_window=8).windows(4) == {2: 8}
    assert CompressionConfig(layer_types="0_2_2_3").windows(4) == {}


@pytest.mark.parametrize("stage", ["finetune", "zero_out"])
def test_policies_whose_slots_are_no_tokens_in_the_end(stage: str) -> None:
    (problem,) = CompressionConfig(layer_types="0_1_1/0", policy=DMCConfig(stage=stage)).problems(3)
    assert "layer 2 reads two layers, and the policy dmc does not keep every token in a slot" in str(problem)
