"""Attention to keys with a bias where a query sees its newest key, its frontier, without it: key t, or key t
- 1 where query t does not see itself.

    keys     0 1 2 3 4
    query 0  F                 F: the frontier, one dot product for each query, joined to the kernel's
    query 1  b F               softmax by its lse
    query 2  b b F             b: the kernel, on queries 1 .. s - 1 and keys 0 .. s - 2
    query 3  b b b F
    query 4  b b b b F

Of s^2 / 2 products of a query and a key, the kernel makes all but s, and the frontier these. Where keys are n
longer than queries, query i has its frontier at key n + i, and query 0 has keys below it, too.

Shapes: as in `lckv.attention.biased`; here q are the queries of a piece and s = n + q its keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.attention.causal import Causal, Rest
from lckv.attention.flash_pairs import FlashPair, Partial
from lckv.attention.pieces import Piece, grouped


def attend_with_frontier(
    query: Tensor, key: Tensor, value: Tensor, scale: float, pieces: list[Piece], pair: FlashPair
) -> Tensor:
    """[b, h, q, d]; 0 for queries that are in no piece."""
    return _Frontier.apply(query, key, value, pieces, Causal(pair, scale))


class _Frontier(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: list[Piece], below: Causal
    ) -> Tensor:
        output = query.new_zeros(*query.shape[:-1], value.shape[-1])
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse, share = (torch.empty(query.shape[:-1], dtype=dtype, device=query.device) for _ in range(2))
        ctx.rests = []
        for piece in pieces:
            q, *results = piece.of_queries(query, output, lse, share)
            ctx.rests.append(_forward(q, *piece.of_keys(key, value), *results, below=below))
        ctx.save_for_backward(query, key, value, output, lse, share)
        ctx.pieces, ctx.below = pieces, below
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, share = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for piece, rest in zip(ctx.pieces, ctx.rests, strict=True):
            of_queries = piece.of_queries(gradient, query, output, lse, share, dq)
            _backward(*of_queries, *piece.of_keys(key, value, dk, dv), rest=rest, below=ctx.below)
        return dq, dk, dv, None, None


def _first_below(query: Tensor, key: Tensor) -> int:
    """The first query that has keys below its frontier."""
    return int(query.shape[2] == key.shape[2])


def _forward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, share: Tensor, *, below: Causal
) -> Rest:
    """Fills `output` and, for queries that have keys below their frontier, `lse` and `share` [b, h, q], the
    frontier's part of the softmax. Returns what the backward of the part below wants back."""
    first = _first_below(query, key)
    if first:
        grouped(output, key)[:, :, :, 0] = value[:, :, None, 0]
    if first == query.shape[2]:
        return ()
    query, output, lse, share = (tensor[:, :, first:] for tensor in (query, output, lse, share))
    partial = below.forward(query, key[:, :, :-1], value[:, :, :-1])
    score = frontier_score(query, key, below.scale, lse.dtype)
    own_value = value[:, :, None, -query.shape[2] :]
    torch.logaddexp(partial.lse, score, out=lse)
    torch.sigmoid(score - partial.lse, out=share)
    older = grouped(partial.output, key)
    weight = grouped(share, key)[..., None].to(older.dtype)
    torch.lerp(older, own_value.expand_as(older), weight, out=grouped(output, key))
    return partial.rest


def _backward(
    gradient: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    share: Tensor,
    dq: Tensor,
    key: Tensor,
    value: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    rest: Rest,
    below: Causal,
) -> None:
    """Fills dq, dk and dv, which are zeros."""
    first = _first_below(query, key)
    if first:
        dv[:, :, 0] = grouped(gradient, key)[:, :, :, 0].sum(2)
    if first == query.shape[2]:
        return
    gradient, query, output, lse, share, dq = (
        tensor[:, :, first:] for tensor in (gradient, query, output, lse, share, dq)
    )
    whole = Partial(output, lse, rest)
    below_dq, below_dk, below_dv = below.backward(gradient, query, key[:, :, :-1], value[:, :, :-1], whole)
    dk[:, :, :-1] += below_dk
    dv[:, :, :-1] += below_dv
    add_frontier_gradients(
        gradient, query, output, share, key, value, below.scale, below_dq=below_dq, dq=dq, dk=dk, dv=dv
    )


def frontier_score(query: Tensor, key: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Of queries and the last keys, as many, each query with its own: [b, h, q], without bias."""
    # Shapes: queries [b, g, h / g, q, ...], frontiers [b, g, 1, q, ...].
    products = grouped(query, key).to(dtype) * key[:, :, None, -query.shape[2] :]
    return products[..., :-1].sum(-1).flatten(1, 2) * scale


def add_frontier_gradients(
    gradient: Tensor,
    query: Tensor,
    output: Tensor,
    share: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    below_dq: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add to dk and dv what comes through the frontiers, whose part of the whole softmax is `share` [b, h,
    q]; dq becomes `below_dq` and what comes through the frontiers. `gradient` and `output`: of the whole."""
    # The frontier's terms are added in all channels; then the last one, which it is seen without, gets its
    # own back.
    bias_gradient = dk[..., -1].clone()
    frontier = slice(-query.shape[2], None)
    own_dk, own_dv = dk[:, :, frontier], dv[:, :, frontier]
    # Shapes: queries [b, g, h / g, q, ...], frontiers [b, g, 1, q, ...].
    gradient, query, output, share = (grouped(tensor, key) for tensor in (gradient, query, output, share))
    own_key, own_value = (tensor[:, :, None, frontier] for tensor in (key, value))
    dscore = share * (gradient * (own_value - output)).sum(-1, dtype=share.dtype) * scale
    share, dscore = (tensor[..., None].to(query.dtype) for tensor in (share, dscore))
    torch.addcmul(grouped(below_dq, dk), dscore, own_key, out=grouped(dq, dk))
    dq[..., -1] = below_dq[..., -1]
    for member in range(query.shape[2]):
        own_dk.addcmul_(dscore[:, :, member], query[:, :, member])
        own_dv.addcmul_(share[:, :, member], gradient[:, :, member])
    dk[..., -1] = bias_gradient
