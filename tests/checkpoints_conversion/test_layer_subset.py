"""Models cut down to some of their layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.layer_subset import (
    LayerSubset,
    cut_description,
    parse_layers,
    runs_of_layers,
    spread_layers,
    with_sources,
)
from lckv.config import CompressionConfig
from lckv.sharing.layer_types import LayerTypes
from lckv.weights.tensors import MemorySource
from megatron_ext.config import ModelConfig


def description(layer_types: str, **compression: object) -> ModelDescription:
    model = ModelConfig(
        num_layers=layer_types.count("_") + 1,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=11,
        max_position_embeddings=16,
    )
    shared = CompressionConfig(layer_types, **compression)  # type: ignore[arg-type]
    return ModelDescription(model, shared, "llama", torch.float32)


@st.composite
def maps_and_layers(draw: st.DrawFn) -> tuple[str, set[int]]:
    size = draw(st.integers(1, 9))
    sources = draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
    wanted = draw(st.sets(st.integers(0, size - 1), min_size=1))
    entries = [str(source) for source in sources]
    for layer in range(size):
        lenders = [below for below in range(layer) if below in sources]
        if sources[layer] == layer and lenders and draw(st.booleans()):
            entries[layer] += f"+{draw(st.sampled_from(lenders))}"
        others = [below for below in lenders if below != sources[layer]]
        if sources[layer] < layer and others and draw(st.booleans()):
            alone = sources[sources[layer]] != sources[layer]  # and nobody else makes its source an owner
            entries[layer] += "+" if alone else draw(st.sampled_from("+/"))
            entries[layer] += str(draw(st.sampled_from(others)))
    return "_".join(entries), wanted


@given(maps_and_layers())
def test_every_layer_reads_the_layer_that_it_read(case: tuple[str, set[int]]) -> None:
    text, wanted = case
    whole = description(text)
    size = whole.model.num_layers
    before = LayerTypes.parse(text, size)
    layers = with_sources(before, wanted)
    assert wanted <= set(layers)
    cut = cut_description(whole, layers)
    after = cut.compression.map(cut.model.num_layers)
    assert [layers[layer.source] for layer in after] == [before[layer].source for layer in layers]
    for kind in ("mixes", "values"):
        others = [None if (one := getattr(layer, kind)) is None else layers[one] for layer in after]
        assert others == [getattr(before[layer], kind) for layer in layers]
    assert set(cut.expected_tensors()) == set(
        LayerSubset(MemorySource({name: torch.zeros(1) for name in whole.expected_tensors()}), layers).infos()
    )


def test_tensors_are_those_of_the_layers() -> None:
    names = [f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in range(12)]
    tensors = {name: torch.full((2, 3), float(layer)) for layer, name in enumerate(names)}
    whole = MemorySource({"decoder.final_layernorm.weight": torch.ones(3), **tensors})
    subset = LayerSubset(whole, (1, 11))
    assert list(subset.infos()) == ["decoder.final_layernorm.weight", *names[:2]]
    assert subset.read(names[1], slice(1, 2)).tolist() == [[11.0] * 3]
    assert subset.read("decoder.final_layernorm.weight").tolist() == [1.0] * 3


@given(maps_and_layers())
def test_a_model_with_a_first_guess_can_be_cut(case: tuple[str, set[int]]) -> None:
    text, wanted = case
    before = LayerTypes.parse(text, text.count("_") + 1)
    if not before.any_cyclic:
        return
    whole = description(text, first_guess=True)
    layers = with_sources(before, wanted, first_guess=True)
    cut = cut_description(whole, layers)
    names = whole.expected_tensors()
    subset = LayerSubset(MemorySource({name: torch.zeros(1) for name in names}), layers)
    assert set(cut.expected_tensors()) == set(subset.infos())


def test_a_window_goes_with_the_last_layer_that_has_it() -> None:
    whole = description("0s_1_1", sliding_window=4)
    assert cut_description(whole, (0, 1)).compression.sliding_window == 4
    assert cut_description(whole, (1, 2)).compression == CompressionConfig("0_0")


def test_two_layers_that_are_read_together_keep_what_caches_keep() -> None:
    """Without layer 3 caches would keep the window of layer 1, and every token of layer 0."""
    layers = with_sources(LayerTypes.parse("0_1s_1/0s_1_4_4", 6), {2})
    assert layers == (0, 1, 2, 3)
    whole = description("0_1s_1/0s_1_4_4", sliding_window=4)
    assert cut_description(whole, layers).compression.layer_types == "0_1s_1/0s_1"


def test_which_layers() -> None:
    assert parse_layers("0, 5,38-39", 40) == (0, 5, 38, 39)
    assert list(runs_of_layers(5, 2)) == [range(2), range(2, 4), range(4, 5)]
    assert (spread_layers(40, 4), spread_layers(2, 4), spread_layers(3, 1)) == ((0, 13, 26, 39), (0, 1), (0,))


@pytest.mark.parametrize("text", ["", "1,,2", "2-1", "-1", "a", "1.5", "1-2-3", "٣"])
def test_texts_that_are_no_list_of_layers(text: str) -> None:
    with pytest.raises(ConversionError, match="it must be a list of layers and ranges of them, such as 0,5"):
        parse_layers(text, 4)


def test_a_layer_that_the_model_does_not_have() -> None:
    with pytest.raises(ConversionError, match=r"--layers is '2-4'; the model has the layers 0 to 3"):
        parse_layers("2-4", 4)
