"""Rotary position embedding (Su et al. 2021), half-split: channel i of a head turns with channel i + D/2.

Shapes: D channels of a head, P any leading shape of positions. Angles are float32 whatever the model's dtype:
in bfloat16 they would be off by radians at position 4095.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Scaling,
    YarnScaling,
    attention_factor,
    follows_length,
)


class Rotation(NamedTuple):
    """Cosine and sine of the angles, times the attention factor of a scaling, float32 [*P, D/2]."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class RotaryEmbedding:
    """That of a model."""

    head_dim: int
    base: float
    scaling: Scaling | None
    max_position_embeddings: int

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on the length of the text."""
        return follows_length(self.scaling)

    @property
    def attention_factor(self) -> float:
        """Of cosines and sines."""
        return attention_factor(self.scaling, self.max_position_embeddings)

    def frequencies(self, length: int | Tensor, *, device: torch.device | str = "cpu") -> Tensor:
        """Radians per position of each channel pair for texts of `length` tokens: float32 [head_dim / 2]. A
        `length` on the device is not brought to the host."""
        scaling = self.scaling
        if isinstance(scaling, DynamicScaling):
            return self._dynamic(scaling, length, device)
        if isinstance(scaling, LongRopeScaling):
            is_long = length > scaling.original_max_position_embeddings
            return _choose(
                is_long,
                lambda: self._divided(scaling.long_factor, device),
                lambda: self._divided(scaling.short_factor, device),
            )
        return inverse_frequencies(self.head_dim, self.base, scaling, device=device)

    def rotation(self, positions: Tensor, length: int | None = None) -> Rotation:
        """Cosines and sines at integer `positions` [*P] for texts of `length` tokens; default: up to the last
        of the positions, which asks nothing of the device."""
        if length is None and self.follows_length:
            frequencies = self.frequencies(positions.max() + 1, device=positions.device)
        else:
            frequencies = self.frequencies(length or 0, device=positions.device)
        return rotation(positions, frequencies, self.attention_factor)

    def _divided(self, factors: tuple[float, ...], device: torch.device | str) -> Tensor:
        divisors = torch.tensor(factors, dtype=torch.float32, device=device)
        return 1.0 / (divisors * _powers(self.head_dim, self.base, device))

    def _dynamic(self, scaling: DynamicScaling, length: int | Tensor, device: torch.device | str) -> Tensor:
        factor, context, channels = scaling.factor, self.max_position_embeddings, self.head_dim

        def stretched() -> Tensor:
            # The base with which the slowest pair turns as if positions were interpolated.
            growth = factor * length / context - (factor - 1)
            return 1.0 / _powers(channels, self.base * growth ** (channels / (channels - 2)), device)

        return _choose(
            length > context, stretched, lambda: inverse_frequencies(channels, self.base, device=device)
        )


def _choose(condition: bool | Tensor, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
    """A condition on the device stays there."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes(), no())
    return yes() if condition else no()


def inverse_frequencies(
    head_dim: int,
    base: float,
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Radians per position of each channel pair: float32 [head_dim / 2]."""
    powers = _powers(head_dim, base, device)
    frequencies = 1.0 / powers
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    if isinstance(scaling, YarnScaling):
        kept = 1 - _yarn_ramp(scaling, head_dim, base, device)
        return (1 - kept) / (scaling.factor * powers) + kept * frequencies
    return frequencies


def _powers(head_dim: int, base: float | Tensor, device: torch.device | str) -> Tensor:
    """float32 [head_dim / 2]: positions per radian of each channel pair."""
    return base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def _yarn_ramp(scaling: YarnScaling, head_dim: int, base: float, device: torch.device | str) -> Tensor:
    """float32 [head_dim / 2]: by how much a channel pair is interpolated, from 0 to 1."""

    def pair_of(turns: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        wavelength = scaling.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(base))

    first, last = (pair_of(turns) for turns in scaling.turns)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    # As published: the bound is the number of channels, not of pairs.
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    width = last - first if last != first else 0.001
    return ((pairs - first) / width).clamp(0, 1)


def rotation(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> Rotation:
    """`factor` times cosines and sines at integer `positions` [*P] for `frequencies` float32 [D/2]."""
    angles = positions.to(torch.float32)[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Rotation(cos, sin) if factor == 1 else Rotation(factor * cos, factor * sin)


class Turned(Protocol):
    """`rotate` without a gradient."""

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, last: Tensor | float | None, /, *, back: bool = False
    ) -> Tensor:
        """Cos and sin float32 as those of angles; `back`: turn by the negative angles."""
        ...


def turned(x: Tensor, cos: Tensor, sin: Tensor, last: Tensor | float | None, *, back: bool = False) -> Tensor:
    """See `Turned`. In four kernels, each over half of the channels."""
    cos, sin, sign = cos.to(x.dtype), sin.to(x.dtype), -1 if back else 1
    first, second = x.chunk(2, dim=-1)
    result = x.new_empty(x.shape)
    one, two = result.chunk(2, dim=-1)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=two).addcmul_(first, sin, value=sign)
    if last is not None:
        torch.mul(first[..., -1], cos[..., -1], out=one[..., -1])
        two[..., -1] = last
    return result


def rotate(
    x: Tensor, angles: Rotation, *, last: Tensor | float | None = None, kernel: Turned = turned
) -> Tensor:
    """Turn `x` [..., D] by `angles`, whose cos and sin
    must broadcast against [..., D/2]; result in x's dtype.

    With `last` [...] the last channel is turned as if it were 0, and then becomes `last`. `kernel` computes
    forward and backward."""
    if torch.compiler.is_compiling():  # the compiler makes one kernel of the formula
        return rotate_by_formula(x, angles, last=last)
    if torch.is_grad_enabled() and (x.requires_grad or (isinstance(last, Tensor) and last.requires_grad)):
        return _Rotate.apply(x, *angles, last, kernel)
    return kernel(x, *angles, last)


def rotate_by_formula(x: Tensor, angles: Rotation, *, last: Tensor | float | None = None) -> Tensor:
    """Same contract as `rotate`, whose oracle it is."""
    cos, sin = angles.cos.to(x.dtype), angles.sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    if last is not None:
        second = torch.cat((second[..., :-1], torch.zeros_like(second[..., :1])), dim=-1)
    one, two = first * cos - second * sin, second * cos + first * sin
    if last is not None:
        newest = torch.as_tensor(last, dtype=x.dtype, device=x.device)[..., None]
        two = torch.cat((two[..., :-1], newest.expand_as(two[..., :1])), dim=-1)
    return torch.cat((one, two), dim=-1)


class _Rotate(torch.autograd.Function):
    """Keeps nothing of what it turns; the gradient is turned back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, last: Tensor | float | None, kernel: Turned
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.last, ctx.kernel = last.dtype if isinstance(last, Tensor) else last, kernel
        return kernel(x, cos, sin, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        last = None if ctx.last is None else 0.0
        of_x = ctx.kernel(gradient, cos, sin, last, back=True) if ctx.needs_input_grad[0] else None
        of_last = gradient[..., -1].to(ctx.last) if isinstance(ctx.last, torch.dtype) else None
        return of_x, None, None, of_last, None


@dataclass(frozen=True, eq=False)
class Turn:
    """RoPE at the positions of some tokens."""

    angles: Rotation
    """Cosines and sines [s, b, 1, D / 2]."""

    kernel: Turned = turned
    """What turns forward and backward."""

    def __call__(self, heads: Tensor, *, last: Tensor | float | None = None) -> Tensor:
        """[s, b, any heads, D] to the same; `last` [s, b, heads] as in `rotate`."""
        return rotate(heads, self.angles, last=last, kernel=self.kernel)

    def at(self, take: Callable[[Tensor], Tensor]) -> "Turn":
        """At those tokens that `take` takes of a tensor [s, b, ...]."""
        return replace(self, angles=Rotation(take(self.angles.cos), take(self.angles.sin)))


@dataclass(frozen=True, eq=False)
class SmallTurn:
    """As `Turn`, for few tokens and without gradient: in three kernels over all channels, of which one
    copies, where `Turn` takes four over half of them. The numbers are the same."""

    cos: Tensor
    """[s, b, 1, D], in the dtype of heads."""

    sin: Tensor
    """The same; of the first half of the channels negative."""

    @classmethod
    def of(cls, angles: Rotation, dtype: torch.dtype) -> "SmallTurn":
        """`angles` are [s, b, D / 2]."""
        cos, sin = (part[:, :, None].to(dtype) for part in angles)
        return cls(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    def __call__(self, heads: Tensor, *, last: Tensor | float | None = None) -> Tensor:
        """[s, b, any heads, D] to the same; `last` [s, b, heads] as in `rotate`."""
        half = heads.shape[-1] // 2
        swapped = heads.view(*heads.shape[:-1], 2, half).flip(-2).reshape(heads.shape)
        result = torch.mul(heads, self.cos).addcmul_(swapped, self.sin)
        if last is not None:
            torch.mul(heads[..., half - 1], self.cos[..., half - 1], out=result[..., half - 1])
            result[..., -1] = last
        return result
