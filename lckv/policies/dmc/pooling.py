"""Keys and values of slots: the mean over the newest W tokens of a slot, weighted by importance.

    P_t = sum over s in t - W + 1 .. t of c(t, s) w_s y_s / sum of c(t, s) w_s
    for y = k and v, c(t, s) = p_{s+1} ... p_t

with p the merge decisions and w the importance. p of the first token of a row plays no part. `pool` chooses
between the fused Triton kernel of `kernels.pooling` and the two algorithms here. All compute in float32, with
memory linear in the length.

Shapes: s tokens, b rows, g KV heads, d channels.
"""

import importlib.util
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lckv.policies.base import RowPart

LARGEST_KERNEL_WINDOW = 64
"""The kernel's work on decisions grows with the square of the window."""


def pool(
    key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """P for keys and values [s, b, g, d], in their dtypes; merge p and weight w are float32 [s, b, g], window
    W is in tokens."""
    if window is not None and why_not_kernel(key.device.type, window) is None:
        from lckv.policies.dmc.kernels.pooling import pool as fused

        return fused(key, value, merge, weight, window)
    return pool_in_torch(key, value, merge, weight, window)


@cache
def why_not_kernel(device_type: str, window: int | None) -> str | None:
    """What keeps the Triton kernel from pooling; None if nothing does."""
    if device_type != "cuda":
        return f"the Triton kernel needs CUDA tensors, the model is on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if window is None or window > LARGEST_KERNEL_WINDOW:
        return f"the Triton kernel takes windows up to {LARGEST_KERNEL_WINDOW} tokens, the window is {window}"
    return None


def pool_in_torch(
    key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Same contract as `pool`."""
    if window is None or window >= key.shape[0]:
        return _without_window(key, value, merge, weight)
    shares = _shares(merge, weight, window)
    return _Band.apply(key, shares), _Band.apply(value, shares)


def pool_parts(
    key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, part: RowPart
) -> tuple[Tensor, Tensor]:
    """`pool` without a window, for parts of rows with nothing of their neighbours in front: the sums of what
    comes before each part are carried into it."""
    channels, weight = key.shape[-1], weight[..., None]
    products = torch.cat((merge[:1, ..., None], torch.zeros_like(weight[1:])))
    # sums of keys, values and weights that begin at 0 in each part, and products of its decisions
    terms = torch.cat((key * weight, value * weight, weight, products), -1)  # [s, b, g, 2 d + 2]
    sums = _Recurrence.apply(terms, merge)
    last = part.reach.own(sums)[-1]
    sums = sums[..., :-1] + sums[..., -1:] * part.carried(last[..., -1], last[..., :-1])
    pooled_key, pooled_value, total = sums.split((channels, channels, 1), -1)
    return (pooled_key / total).to(key.dtype), (pooled_value / total).to(value.dtype)


def pool_by_formula(features: Tensor, merge: Tensor, weight: Tensor, window: int | None) -> Tensor:
    """The formula for `features` [s, b, g, d] as it stands, with a matrix of s x s:
    the oracle of the others."""
    length = features.shape[0]
    row, rows = torch.zeros_like(merge), []
    for token in range(length):
        # c(t, s) = c(t - 1, s) p_t for s < t, and 1 for s = t
        row = torch.cat((row[:token] * merge[token], torch.ones_like(row[:1]), row[token + 1 :]))
        rows.append(row)
    age = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    inside = age < (length if window is None else window)
    shares = torch.stack(rows) * inside[..., None, None] * weight
    return torch.einsum("tsbg,sbgd->tbgd", shares / shares.sum(1, keepdim=True), features)


def _shares(merge: Tensor, weight: Tensor, window: int) -> Tensor:
    """[W, s, b, g]: the share of token t - j in P_t at [j, t]; 0 where there is no such token."""
    length = merge.shape[0]
    product, shares = torch.ones_like(merge), [weight]
    for age in range(1, window):
        product = product[1:] * merge[1 : length - age + 1]
        shares.append(pad(product * weight[: length - age], (0, 0, 0, 0, age, 0)))
    unnormalised = torch.stack(shares)
    return unnormalised / unnormalised.sum(0)


class _Band(torch.autograd.Function):
    """The product of a banded matrix, one per row and head, with features:
    W shifted multiply-adds and no copies."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(features, shares)
        length, wide = features.shape[0], features.to(shares.dtype)
        result = shares[0, ..., None] * wide
        for age in range(1, len(shares)):
            result[age:].addcmul_(shares[age, age:, ..., None], wide[: length - age])
        return result.to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features, shares = ctx.saved_tensors
        length, gradient, wide = features.shape[0], gradient.to(shares.dtype), features.to(shares.dtype)
        of_features, of_shares = torch.zeros_like(wide), torch.zeros_like(shares)
        for age in range(len(shares)):
            of_features[: length - age].addcmul_(shares[age, age:, ..., None], gradient[age:])
            torch.sum(gradient[age:] * wide[: length - age], -1, out=of_shares[age, age:])
        return of_features.to(features.dtype), of_shares


def _without_window(key: Tensor, value: Tensor, merge: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight[..., None]
    total = _Recurrence.apply(weight, merge)
    means = (_Recurrence.apply(features * weight, merge) / total for features in (key, value))
    pooled_key, pooled_value = (
        mean.to(features.dtype) for mean, features in zip(means, (key, value), strict=True)
    )
    return pooled_key, pooled_value


class _Recurrence(torch.autograd.Function):
    """Sums S_t = p_t S_{t-1} + x_t for x float32 [s, b, g, d] and p [s, b, g]."""

    @staticmethod
    def forward(ctx: Any, terms: Tensor, merge: Tensor) -> Tensor:
        sums = _recur(terms, pad(merge[1:], (0, 0, 0, 0, 1, 0)))
        ctx.save_for_backward(merge, sums)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        merge, sums = ctx.saved_tensors
        # The same recurrence from the newest token to the oldest, one step of p later.
        of_terms = _recur(gradient.flip(0), pad(merge[1:].flip(0), (0, 0, 0, 0, 1, 0))).flip(0)
        of_merge = pad((of_terms[1:] * sums[:-1]).sum(-1), (0, 0, 0, 0, 1, 0))
        return of_terms, of_merge


def _recur(terms: Tensor, factors: Tensor) -> Tensor:
    """S_t = factors_t S_{t-1} + terms_t in about 2 sqrt(s) steps: within chunks, all of them at once, then
    from chunk to chunk."""
    length = terms.shape[0]
    chunk = math.isqrt(length)
    missing = -length % chunk
    sums = pad(terms, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(0, (-1, chunk))
    factors = pad(factors, (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, chunk))[..., None]
    products = factors.clone()
    for step in range(1, chunk):
        sums[:, step].addcmul_(factors[:, step], sums[:, step - 1])
        products[:, step] *= products[:, step - 1]
    for number in range(1, len(sums)):
        sums[number].addcmul_(products[number], sums[number - 1, -1])
    return sums.flatten(0, 1)[:length]
