"""Decisions of yes or no that training makes softly, and noisily: their noise, their rounding, their share.

Shapes: s tokens, b rows, g KV heads. Everything is float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lckv.policies.base import TokenContext


def straight_through(soft: Tensor) -> Tensor:
    """Decisions rounded to 0 or 1, with the gradient of `soft`."""
    return (soft > 0.5).float() + (soft - soft.detach())


def decision_rate(soft: Tensor, logits: Tensor, context: TokenContext) -> Tensor:
    """[b, g]: share of the counted tokens with a decision of 1, as `TokenContext.mean`, differentiable in
    `soft` [s, b, g]; NaN where one of the decision logits is not finite."""
    return context.mean(straight_through(soft) + logits.detach() * 0)


def draw_noise(shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """The difference of two Gumbel variables, which is logistic, for `shape` [s, b, g];
    row i depends on `seeds[i]` only."""
    tokens, rows, heads = shape
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows; every row needs one.")
    generator = torch.Generator(device)
    uniform = torch.empty(shape, device=device)
    for row, seed in enumerate(seeds):
        uniform[:, row] = torch.rand(tokens, heads, device=device, generator=generator.manual_seed(seed))
    return torch.logit(uniform, eps=2.0**-24)  # the step of float32 below 1
