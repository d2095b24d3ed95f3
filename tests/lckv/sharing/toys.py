"""A tiny model in float64 whose layers read each other's keys and values: what plans are compared on."""

import torch
from torch import Tensor

from lckv.sharing.execution import Two
from lckv.sharing.layer_types import LayerTypes

ROWS = 3


class ToyLayers:
    """Layers of which every part is an elementwise function, and attention to zeros is exactly 0."""

    def __init__(self, layer_types: LayerTypes, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer_types = layer_types
        weights = torch.randn(3, len(layer_types), dtype=torch.float64, generator=generator)
        self.weights = weights.requires_grad_()
        self.inputs = torch.randn(ROWS, dtype=torch.float64, generator=generator).requires_grad_()
        self._lent: dict[int, Tensor] = {}

    def run(self, index: int, hidden_states: Tensor, source: Tensor | Two[Tensor] | None, *, kept: bool):
        if isinstance(source, Two):
            source = self.joined(index, *source)
        if self.layer_types[index].borrows is not None:
            assert source is not None
            own, source = self.mixed_keys_values(index, hidden_states, source), None
        else:
            own = self._own(index, hidden_states)
        attended = self.attention(index, hidden_states, own if source is None else source)
        return self.feed_forward(index, hidden_states + attended), own

    def keys_values(self, index: int, hidden_states: Tensor) -> Tensor:
        self._lent = {index: torch.sin(hidden_states * self.weights[0, index])}
        return self._lent[index]

    def mixed_keys_values(self, index: int, hidden_states: Tensor, lent: Tensor) -> Tensor:
        self._lent = {index: 0.5 * self.keys_values(index, hidden_states) + torch.cos(lent)}
        return self._lent[index]

    def joined(self, index: int, first: Tensor, second: Tensor) -> Tensor:
        """What a layer reads of two others."""
        if self.layer_types[index].values is not None:
            return first - 2 * second
        return 0.75 * first + torch.cos(second)

    def lent(self, index: int) -> Tensor:
        return self._lent.pop(index)

    def run_without_source(self, index: int, hidden_states: Tensor):
        return self.feed_forward(index, hidden_states), self._own(index, hidden_states)

    def zeros(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)

    def first_guess(self, source: int, hidden_states: Tensor) -> Tensor:
        raise AssertionError("no map of the tests has a first guess")

    def attention(self, index: int, hidden_states: Tensor, source: Tensor) -> Tensor:
        return source * torch.sigmoid(hidden_states * self.weights[1, index])

    def feed_forward(self, index: int, hidden_states: Tensor) -> Tensor:
        return hidden_states + torch.tanh(hidden_states * self.weights[2, index])

    def gradients(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sum of `output`, with respect to weights and inputs."""
        first, second = torch.autograd.grad(output.sum(), (self.weights, self.inputs))
        return first, second

    def _own(self, index: int, hidden_states: Tensor) -> Tensor | None:
        return self.keys_values(index, hidden_states) if index in self.layer_types.kv_layers else None
