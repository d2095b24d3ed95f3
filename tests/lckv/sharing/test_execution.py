"""How a plan is run: what is missing is an error, passes stop where they may, and only the last one
counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.sharing.execution import State, run_steps, source_of
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import LayerRun, Origin, Part, Read, iteration_plan


class Recorder:
    """Layers that add their number and what they read; what they compute for readers is their input."""

    def __init__(self, layer_types: LayerTypes) -> None:
        self.layer_types, self.calls = layer_types, []

    def run(self, index: int, hidden_states: Tensor, source: Tensor | None, *, kept: bool):
        self.calls.append((index, "kept" if kept else "run", torch.is_grad_enabled()))
        own = hidden_states if index in self.layer_types.kv_layers else None
        return hidden_states + index + 0.1 * (hidden_states if source is None else source), own

    def keys_values(self, index: int, hidden_states: Tensor) -> Tensor:
        self.calls.append((index, "keys_values", torch.is_grad_enabled()))
        return hidden_states

    def run_without_source(self, index: int, hidden_states: Tensor):
        self.calls.append((index, "without", torch.is_grad_enabled()))
        return hidden_states + index, hidden_states if index in self.layer_types.kv_layers else None

    def zeros(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def run(text: str, m: int, b: int, converged=None):
    layer_types = LayerTypes.parse(text, text.count("_") + 1)
    layers = Recorder(layer_types)
    steps = iteration_plan(layer_types, m, b)
    return run_steps(steps, layers, State(torch.ones(1), {}), converged), layers.calls


def test_a_missing_source_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"layer 1 reads the keys and values of layer 0, but this pass has those of \[2\]"
    ):
        source_of(LayerRun(1, Part.WHOLE, Read(Origin.BELOW, 0, 0), False, False, ()), {2: None}, None)
    with pytest.raises(
        ValueError,
        match=r"layer 1 reads the keys and values of layer 4, but the previous pass has those of \[\]",
    ):
        source_of(
            LayerRun(1, Part.WHOLE, Read(Origin.PREVIOUS_PASS, 4, 0), False, False, ()), {4: None}, None
        )


def test_passes_before_the_last_stop_at_the_keys_and_values() -> None:
    outcome, calls = run("0_2_2_3", 1, 2)
    first = [(1, "without", False), (2, "keys_values", False)]
    second = [(1, "run", True), (2, "keys_values", True)]
    last = [(1, "kept", True), (2, "kept", True)]
    assert calls == [(0, "kept", True), *first, *second, *last, (3, "kept", True)]
    assert outcome.passes == 3
    assert outcome.available == {}


class Guesser(Recorder):
    """Guesses a number by which a layer is known."""

    def first_guess(self, source: int, hidden_states: Tensor) -> Tensor:
        self.calls.append((source, "guess", torch.is_grad_enabled()))
        return hidden_states + 100 * source


def test_the_first_pass_reads_the_guess() -> None:
    """It is made once, with gradient, from the group's input, and read by attention in a whole layer."""
    layer_types = LayerTypes.parse("0_2_2_3", 4)
    layers = Guesser(layer_types)
    steps = iteration_plan(layer_types, 1, 1, first_guess=True)
    run_steps(steps, layers, State(torch.ones(1), {}))
    first = [(2, "guess", True), (1, "run", False), (2, "keys_values", False)]
    assert layers.calls[1:6] == [*first, (1, "kept", True), (2, "kept", True)]
    alone = Guesser(layer_types)
    (_, one, _) = iteration_plan(layer_types, 0, 1, first_guess=True)
    state = run_steps([one], alone, State(torch.ones(1), {}))
    # layer 1 adds its number and a tenth of the guess, layer 2 the same of its own, its input
    assert state.hidden_states.item() == pytest.approx((1 + 1 + 0.1 * 201) * 1.1 + 2)


def test_a_good_guess_can_settle_in_one_pass() -> None:
    layer_types = LayerTypes.parse("0_2_2_3", 4)
    asked: list[tuple[int, ...]] = []

    def converged(before, after) -> bool:
        asked.append((*before, *after))
        return True

    steps = iteration_plan(layer_types, 5, 1, first_guess=True)
    assert run_steps(steps, Guesser(layer_types), State(torch.ones(1), {}), converged).passes == 2
    assert asked == [(2, 2)]


def test_one_pass_reads_zeros() -> None:
    outcome, calls = run("1_1", 0, 1)
    assert calls == [(0, "kept", True), (1, "kept", True)]
    assert outcome.hidden_states.item() == pytest.approx(1 + 0 + 1 + 0.1)


def test_converged_passes_end_early() -> None:
    asked = []
    outcome, _ = run(
        "1_1", 7, 2, lambda previous, current: asked.append((previous, current)) or len(asked) == 2
    )
    assert outcome.passes == 4
    assert [set(pair[0]) | set(pair[1]) for pair in asked] == [{1}, {1}]


@given(st.integers(0, 3), st.integers(1, 3))
def test_every_pass_feeds_the_next(m: int, b: int) -> None:
    """Layer 0 reads what layer 1 computed one pass before: x + 0.1 of it."""
    outcome, _ = run("1_1", m, b)
    source = 0.0
    for _ in range(m + b):
        first = 1 + 0.1 * source
        source = first
    assert outcome.hidden_states.item() == pytest.approx(first + 1 + 0.1 * first)
