"""Losses from hidden states: every backend against the logits of all tokens, and how one is chosen."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lckv.errors import UnsupportedError
from lckv.losses.backends import NAMES, choose

TOKENS, ROWS, HIDDEN, VOCABULARY = 13, 2, 8, 11


class _Head:
    """An output layer on one rank that counts the most logits that it made at once."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.most, self.calls = weight, 0, 0

    def logits(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        self.most = max(self.most, hidden_states.shape[:2].numel())
        return linear(hidden_states, self.weight)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _problem() -> tuple[_Head, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    states = torch.randn(TOKENS, ROWS, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    return _Head(weight), states, torch.randint(VOCABULARY, (TOKENS, ROWS), generator=generator)


def _losses_and_gradients(name: str, chunk_size: int) -> tuple[Tensor, ...]:
    head, states, targets = _problem()
    losses = choose(name, chunk_size=chunk_size).token_loss(head, states, targets)
    weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=losses.dtype).view(losses.shape)
    gradients = torch.autograd.grad((losses * weights).sum(), (states, head.weight))
    return losses, *gradients


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8, 25, 26, 100])
def test_chunks_give_the_same_losses_and_gradients(chunk_size: int) -> None:
    for ours, whole in zip(
        _losses_and_gradients("chunked", chunk_size), _losses_and_gradients("whole", 0), strict=True
    ):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunk_size", "most"), [(1, 2), (5, 4), (8, 8), (26, 26)])
def test_no_more_logits_than_a_chunk(chunk_size: int, most: int) -> None:
    head, states, targets = _problem()
    losses = choose("auto", chunk_size=chunk_size).token_loss(head, states, targets)
    losses.sum().backward()
    assert head.most == most


def test_auto_follows_the_chunk_size() -> None:
    assert choose("auto", chunk_size=0).name == "whole"
    assert choose("auto", chunk_size=7).name == "chunked"
    assert "7 tokens" in choose("auto", chunk_size=7).reason


@pytest.mark.parametrize(
    ("name", "chunk_size", "obstacle"),
    [
        ("whole", 4, "chunks of 4 tokens"),
        ("chunked", 0, "number of tokens of a chunk"),
        ("liger", 0, ", ".join(NAMES)),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(name: str, chunk_size: int, obstacle: str) -> None:
    with pytest.raises(UnsupportedError, match=obstacle) as caught:
        choose(name, chunk_size=chunk_size)
    assert caught.value.asked == name
