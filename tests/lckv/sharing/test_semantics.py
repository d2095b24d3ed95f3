"""What the list of steps computes is what the text of the method says, written down as a plain recursion."""

from functools import cache

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.sharing.execution import State, run_steps
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import iteration_plan
from tests.lckv.sharing.maps import mixing_maps
from tests.lckv.sharing.toys import ToyLayers


def bottoms_of(sources: list[int]) -> list[int]:
    """For each layer the lowest one of those that are iterated with it; itself where it runs once."""
    bottoms: list[int] = []
    while len(bottoms) < len(sources):
        bottom = top = len(bottoms)
        while top < max(sources[bottom : top + 1]):
            top = max(sources[bottom : top + 1])
        bottoms += [bottom] * (top + 1 - bottom)
    return bottoms


def recursion(layers: ToyLayers, m: int, b: int) -> Tensor:
    """The output of the top layer: every value is asked of those that it is made of."""
    sources = [layer.source for layer in layers.layer_types]
    bottoms = bottoms_of(sources)
    iterated = [sources[bottom] > bottom for bottom in bottoms]

    def last(index: int) -> int:
        return m + b - 1 if iterated[index] else 0

    def with_gradient(value: Tensor, index: int, number: int) -> Tensor:
        return value.detach() if iterated[index] and number < m else value

    @cache
    def entering(index: int, number: int) -> Tensor:
        if index == 0:
            return layers.inputs
        if index == bottoms[index]:
            return leaving(index - 1, last(index - 1))
        return leaving(index - 1, number)

    @cache
    def keys_values(index: int, number: int) -> Tensor:
        own = layers.keys_values(index, entering(index, number))
        lender = layers.layer_types[index].borrows
        if lender is not None:
            same_pass = number if lender >= bottoms[index] else last(lender)
            own = layers.mixed_keys_values(index, entering(index, number), keys_values(lender, same_pass))
        return with_gradient(own, index, number)

    def read(index: int, number: int) -> Tensor:
        layer = layers.layer_types[index]
        others = {layer.mixes, layer.values} - {None, layer.borrows}
        first, *second = (read_one(index, source, number) for source in (layer.source, *others))
        return layers.joined(index, first, *second) if second else first

    def read_one(index: int, source: int, number: int) -> Tensor:
        if source > index:
            return keys_values(source, number - 1) if number else layers.zeros(layers.inputs)
        return keys_values(source, number if source >= bottoms[index] else last(source))

    @cache
    def leaving(index: int, number: int) -> Tensor:
        states = entering(index, number)
        attended = layers.attention(index, states, read(index, number))
        return with_gradient(layers.feed_forward(index, states + attended), index, number)

    top = len(sources) - 1
    return leaving(top, last(top))


@given(mixing_maps(9), st.integers(0, 3), st.integers(1, 3))
def test_the_list_computes_what_the_method_says(layer_types: LayerTypes, m: int, b: int) -> None:
    layers = ToyLayers(layer_types)
    state = run_steps(iteration_plan(layer_types, m, b), layers, State(layers.inputs, {}))
    expected = recursion(layers, m, b)
    assert torch.equal(state.hidden_states, expected)
    torch.testing.assert_close(
        layers.gradients(state.hidden_states), layers.gradients(expected), rtol=1e-10, atol=1e-10
    )
    assert state == State(state.hidden_states, {}, passes=m + b if layer_types.any_cyclic else 1)
