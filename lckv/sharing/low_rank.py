"""Keys and values that several trained layers can share: the best of low rank, and what each layer's queries
and outputs become with them.

What leaves a layer unchanged, D channels in a head, per KV head:

- a matrix M, D x D and invertible: values v -> v M, columns of the output projection W -> W M^-T;
- of every pair of channels (i and i + D/2) that RoPE turns together, read as one complex number, a factor
  c != 0: keys k -> k / c, queries q -> conj(c) q. Other matrices do not commute with RoPE.

So a layer that reads shared keys and values may choose M and the factors c. `fit` finds the shared projection
and every reader's M and c at once: reduced-rank regression (Izenman 1975) of the readers' values, which is a
truncated SVD of what the owner's input says of them, and the same of rank one, over complex numbers, for each
pair of channels of the keys.

Shapes: N tokens, e channels of a layer's input (one more, which is always 1, where projections have a bias),
r readers, g KV heads, G query heads of a KV head, D channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-3
"""Weight of the penalty on leaving the readers' own weights, in mean squares of an input channel."""
_FLOOR = 1e-6
"""Least weight of a direction of values or a pair of keys, as a share of the mean."""


@dataclass(frozen=True, eq=False)
class Reader:
    """What a trained layer computes from its own input, and what for."""

    key: Tensor
    """[N, g, D], before RoPE."""

    value: Tensor
    """[N, g, D]."""

    key_weight: Tensor
    """[g, D, e]."""

    value_weight: Tensor
    """[g, D, e]."""

    query_energy: Tensor
    """Mean square of the queries that read each pair of key channels, [g, D / 2]."""

    output_gram: Tensor
    """W^T W of the output projection, summed over the query heads that read a head of values, [g, D, D]."""


class SharedProjections(NamedTuple):
    """Weights for keys and values that all readers share, and how each makes its own of them. float64."""

    key_weight: Tensor
    """[g, D, e]."""

    value_weight: Tensor
    """[g, D, e]."""

    factors: Tensor
    """Complex [r, g, D / 2]: a reader's pair of key channels is about its factor times the shared one."""

    mixes: Tensor
    """[r, g, D, D]: a reader's values, rows, are about the shared ones times its matrix."""


def fit(owner_input: Tensor, readers: Sequence[Reader]) -> SharedProjections:
    """The projections of `owner_input` [N, e] from which the readers' keys and values are best restored.

    An error counts as much as it moves the reader's output (values) or its attention scores (keys). Where the
    input says nothing, weights stay near the readers' own. Computed in float64.
    """
    x = owner_input.double()
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    factor = torch.linalg.cholesky(gram)

    def predicted(own: Tensor, weight: Tensor) -> Tensor:
        """Weights [g, D, e] that make of the owner's input what the reader computes, [N, g, D], from its."""
        rows = weight.double().flatten(0, 1)
        missing = own.double().flatten(1) - x @ rows.T
        return (rows + torch.cholesky_solve(x.T @ missing, factor).T).unflatten(0, weight.shape[:2])

    keys = torch.stack([predicted(reader.key, reader.key_weight) for reader in readers])
    values = torch.stack([predicted(reader.value, reader.value_weight) for reader in readers])
    energies = torch.stack([reader.query_energy.double() for reader in readers])
    metrics = torch.stack([reader.output_gram.double() for reader in readers])
    shared_keys, factors = _shared_keys(keys, energies, gram)
    shared_values, mixes = _shared_values(values, metrics, gram)
    return SharedProjections(shared_keys, shared_values, factors, mixes)


def _shared_keys(weights: Tensor, energies: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Of weights [r, g, D, e]: the shared ones [g, D, e] and factors [r, g, D / 2]."""
    floor = _FLOOR * energies.mean(0) + torch.finfo(gram.dtype).tiny
    importance = torch.maximum(energies, floor).sqrt()[..., None]  # [r, g, D / 2, 1]
    pairs = (as_pairs(weights) * importance).permute(1, 2, 0, 3)  # [g, D / 2, r, e]
    covariance = pairs @ gram.to(pairs.dtype) @ pairs.mH  # [g, D / 2, r, r]
    strongest = torch.linalg.eigh(covariance).eigenvectors[..., -1]  # [g, D / 2, r]
    shared = torch.einsum("gpr,gpre->gpe", strongest.conj(), pairs)
    factors = strongest.permute(2, 0, 1) / importance[..., 0]
    scale = factors.abs().square().mean(0).sqrt()  # factors become about 1, weights as large as the readers'
    return as_channels(shared * scale[..., None]), factors / scale


def _shared_values(weights: Tensor, metrics: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Of weights [r, g, D, e]: the shared ones [g, D, e] and mixes [r, g, D, D]."""
    readers, _, channels, _ = weights.shape
    size = metrics.diagonal(dim1=-2, dim2=-1).mean((0, 2)) + torch.finfo(gram.dtype).tiny  # [g]
    floor = _FLOOR * size[:, None, None] * torch.eye(channels, dtype=gram.dtype)
    squares, axes = torch.linalg.eigh(metrics + floor)
    squares = torch.maximum(squares, floor.diagonal(dim1=-2, dim2=-1))
    root = axes * squares.sqrt()[..., None, :] @ axes.mT  # [r, g, D, D]
    inverse = axes * squares.rsqrt()[..., None, :] @ axes.mT
    seen = (root @ weights).transpose(0, 1).flatten(1, 2)  # [g, r D, e], as outputs see them
    basis = torch.linalg.eigh(seen @ gram @ seen.mT).eigenvectors[..., -channels:]  # [g, r D, D]
    shared = basis.mT @ seen
    mixes = basis.unflatten(1, (readers, channels)).transpose(0, 1).mT @ inverse
    own = weights.square().mean((0, 2, 3))
    scale = (own / (shared.square().mean((1, 2)) + torch.finfo(gram.dtype).tiny)).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)[:, None, None]
    return shared * scale, mixes / scale


def as_pairs(weight: Tensor) -> Tensor:
    """Rows [..., D, e] as complex ones, [..., D / 2, e]: channel i is the real part of pair i, channel
    i + D / 2 the imaginary part."""
    return torch.complex(*weight.chunk(2, dim=-2))


def as_channels(pairs: Tensor) -> Tensor:
    """The inverse of `as_pairs`."""
    return torch.cat([pairs.real, pairs.imag], dim=-2)


def turned_queries(weight: Tensor, factors: Tensor) -> Tensor:
    """Query weights [g, G, D, e] of a layer, for shared keys of which its own are `factors` [g, D / 2] times:
    scores stay what they are. In the dtype of `weight`."""
    pairs = as_pairs(weight.double()) * factors.conj()[:, None, :, None]
    return as_channels(pairs).to(weight.dtype)


def mixed_outputs(weight: Tensor, mixes: Tensor) -> Tensor:
    """Output weights [h, g, G, D] of a layer, for shared values of which its own are those times `mixes`
    [g, D, D]: outputs stay what they are. In the dtype of `weight`."""
    return torch.einsum("hgad,gcd->hgac", weight.double(), mixes).to(weight.dtype)


def refitted_outputs(weight: Tensor, squares: Tensor, products: Tensor, ridge: float) -> Tensor:
    """The output projection [h, A] of which results are closest to what was wanted of them, a penalty away
    from `weight` [h, A].

    `squares` [A, A] and `products` [A, h] are sums over tokens of o^T o and o^T (wanted - o weight^T), for
    rows o of heads' outputs; `ridge`: weight of the penalty, in mean squares of a channel of o.
    """
    penalty = ridge * squares.diagonal().mean() + torch.finfo(squares.dtype).tiny
    change = torch.linalg.solve(
        squares + penalty * torch.eye(len(squares), dtype=squares.dtype, device=squares.device), products
    )
    return (weight.double() + change.T).to(weight.dtype)
