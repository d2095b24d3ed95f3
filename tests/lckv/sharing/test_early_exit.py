"""Plans that end early: exactly what is wanted is left, and it is what the whole plan gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.sharing.early_exit import Results, exit_early
from lckv.sharing.execution import State, run_steps
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import Part, iteration_plan
from tests.lckv.sharing.maps import maps

TOKENS, PLACES = 5, torch.tensor([1, 4])


class NarrowingLayers:
    """Toys [tokens] in float64, causal means for attention, that note for how many tokens which part runs."""

    def __init__(self, layer_types: LayerTypes) -> None:
        self.layer_types = layer_types
        self.weights = torch.randn(3, len(layer_types), dtype=torch.float64)
        self.kept: dict[int, Tensor] = {}
        self.fed: list[tuple[int, int]] = []
        """Layers and tokens of each feed-forward."""

    def run(self, index: int, hidden_states: Tensor, source: Tensor | None, *, kept: bool):
        own = self._own(index, hidden_states)
        return self._rest(index, hidden_states, own if source is None else source, torch.arange(TOKENS)), own

    def run_wanted(self, index: int, hidden_states: Tensor, source: Tensor | None):
        own = self._own(index, hidden_states)
        if own is not None:
            hidden_states = hidden_states[PLACES]
        return self._rest(index, hidden_states, own if source is None else source, PLACES), own

    def keys_values(self, index: int, hidden_states: Tensor) -> Tensor:
        assert len(hidden_states) == TOKENS
        self.kept[index] = torch.sin(hidden_states * self.weights[0, index])
        return self.kept[index]

    def run_without_source(self, index: int, hidden_states: Tensor):
        return self.run(index, hidden_states, self.zeros(hidden_states), kept=False)

    def zeros(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)

    def first_guess(self, source: int, hidden_states: Tensor) -> Tensor:
        assert len(hidden_states) == TOKENS
        return torch.cos(hidden_states * self.weights[0, source])

    def _own(self, index: int, hidden_states: Tensor) -> Tensor | None:
        return self.keys_values(index, hidden_states) if index in self.layer_types.kv_layers else None

    def _rest(self, index: int, hidden_states: Tensor, source: Tensor, places: Tensor) -> Tensor:
        means = source.cumsum(0) / torch.arange(1, TOKENS + 1)
        hidden_states = hidden_states + means[places] * torch.sigmoid(hidden_states * self.weights[1, index])
        self.fed.append((index, len(hidden_states)))
        return hidden_states + torch.tanh(hidden_states * self.weights[2, index])


@given(maps(9), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_results_and_what_is_kept_are_those_of_the_whole_plan(
    layer_types: LayerTypes, m: int, b: int, first_guess: bool
) -> None:
    steps = iteration_plan(layer_types, m, b, first_guess=first_guess)
    whole = NarrowingLayers(layer_types)
    start = State(torch.randn(TOKENS, dtype=torch.float64), {})
    expected = run_steps(steps, whole, start)
    top = max(layer_types.kv_layers)
    for results, tokens in ((Results.ALL, TOKENS), (Results.SOME, len(PLACES)), (Results.NONE, 0)):
        layers = NarrowingLayers(layer_types)
        layers.weights = whole.weights
        outcome = run_steps(exit_early(steps, results), layers, start)
        assert outcome.passes == expected.passes
        torch.testing.assert_close(layers.kept, whole.kept, rtol=0, atol=0)
        if results is not Results.NONE:
            places = PLACES if results is Results.SOME else torch.arange(TOKENS)
            torch.testing.assert_close(outcome.hidden_states, expected.hidden_states[places], rtol=0, atol=0)
        # In the pass that counts the top ones run for what is wanted, and all else as it did.
        last = len(whole.fed) - (len(layer_types) - top)
        wanted = [(index, tokens) for index in range(top, len(layer_types)) if tokens]
        assert layers.fed == whole.fed[:last] + wanted


@pytest.mark.parametrize(
    ("text", "some", "none"),
    [
        ("0_1_2", ["whole", "whole", "wanted"], ["whole", "whole", "keys and values"]),
        ("0_0_2_2_2", ["whole"] * 2 + ["wanted"] * 3, ["whole"] * 2 + ["keys and values"] + ["nothing"] * 2),
        ("1_1", ["wanted" if layer else "whole" for layer in range(2)], ["whole", "keys and values"]),
        ("0_0_0", ["wanted"] * 3, ["keys and values", "nothing", "nothing"]),
    ],
)
def test_parts_of_the_pass_that_counts(text: str, some: list[str], none: list[str]) -> None:
    layer_types = LayerTypes.parse(text, text.count("_") + 1)
    steps = iteration_plan(layer_types, 1, 1)
    for results, expected in ((Results.SOME, some), (Results.NONE, none)):
        runs = [run for step in exit_early(steps, results) if step.update for run in step.runs]
        assert [run.part.value for run in runs] == expected
        assert all((run.reads is None) == (run.part in (Part.KEYS_VALUES, Part.NOTHING)) for run in runs)
    assert exit_early(steps, Results.ALL) == steps
    # Passes that prepare serve keys and values of all tokens.
    assert [step for step in exit_early(steps, Results.NONE) if not step.update] == [
        step for step in steps if not step.update
    ]


def test_other_layers_cannot_run_such_a_plan() -> None:
    class Others:
        """What `Layers` has, without `run_wanted`."""

        run = keys_values = run_without_source = zeros = None

    steps = exit_early(iteration_plan(LayerTypes.plain(1), 0, 1), Results.SOME)
    with pytest.raises(AssertionError, match="the plan ends early for layers that cannot"):
        run_steps(steps, Others(), State(torch.ones(1), {}))
