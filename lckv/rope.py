"""Rotary position embedding (Su et al. 2021), half-split: channel i of a head turns with channel i + D/2.

Shapes: D channels of a head, P any leading shape of positions. Angles are float32 whatever the model's dtype:
in bfloat16 they would be off by radians at position 4095.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: low frequencies are divided by the factor,
    high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency is divided by the factor."""

    factor: float


class Rotation(NamedTuple):
    """Cosine and sine of the angles, float32 [*P, D/2]."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(
    head_dim: int,
    base: float,
    scaling: Llama3Scaling | LinearScaling | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Radians per position of each channel pair: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / base**exponents
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies


def rotation(positions: Tensor, frequencies: Tensor) -> Rotation:
    """Cosines and sines at integer `positions` [*P] for `frequencies` float32 [D/2]."""
    angles = positions.to(torch.float32)[..., None] * frequencies
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Turn `x` [..., D] by `angles`, whose cos and sin
    must broadcast against [..., D/2]; result in x's dtype."""
    cos, sin = angles.cos.to(x.dtype), angles.sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True, eq=False)
class Turn:
    """RoPE at the positions of some tokens."""

    angles: Rotation
    """Cosines and sines [s, b, 1, D / 2]."""

    def __call__(self, heads: Tensor) -> Tensor:
        """[s, b, any heads, D] to the same."""
        return rotate(heads, self.angles)

    def at(self, take: Callable[[Tensor], Tensor]) -> "Turn":
        """At those tokens that `take` takes of a tensor [s, b, ...]."""
        return Turn(Rotation(take(self.angles.cos), take(self.angles.sin)))
