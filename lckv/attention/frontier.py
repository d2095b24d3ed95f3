"""Attention to keys with a bias where a query sees its newest key, its frontier, without it: key t, or key t
- 1 where query t does not see itself.

    keys     0 1 2 3 4
    query 0  F                 F: the frontier, one dot product for each query, joined to the kernel's
    query 1  b F               softmax by its lse
    query 2  b b F             b: the kernel, on queries 1 .. s - 1 and keys 0 .. s - 2
    query 3  b b b F
    query 4  b b b b F

Of s^2 / 2 products of a query and a key, the kernel makes all but s, and the frontier these. Where keys are n
longer than queries, query i has its frontier at key n + i, and query 0 has keys below it, too. The first
query of a document has none below it: it is closed for the kernel (`sequences.py`), and its softmax is its
frontier's.

Shapes: as in `lckv.attention.biased`; here f are the queries that have a frontier, and of these n <= f, the
last ones, are given to the kernel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.attention.causal import Causal, Rest, attend_causal
from lckv.attention.flash_pair import FlashPair, Partial
from lckv.attention.sequences import Layout, layout_of
from lckv.attention.visibility import Visibility


def attend_with_frontier(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, pair: FlashPair
) -> Tensor:
    """[b, h, q, d]; 0 for queries that see nothing."""
    behind, sizes = int(visibility.exclude_self), (len(key), key.shape[2], query.shape[2])
    frontier, below = (layout_of(visibility.documents, *sizes, age) for age in (behind, behind + 1))
    if frontier.is_empty:
        return attend_causal(query, key, value, Causal(pair, scale, frontier))
    return _Frontier.apply(query, key, value, frontier, Causal(pair, scale, below))


class _Frontier(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, frontier: Layout, below: Causal
    ) -> Tensor:
        output = torch.empty_like(query[..., : value.shape[-1]])
        blind = output[:, :, : frontier.queries.start]
        if blind.shape[2]:
            blind.zero_()
        of_frontier = query[:, :, frontier.queries], key[:, :, frontier.keys], value[:, :, frontier.keys]
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse = frontier_score(*of_frontier[:2], below.scale, dtype)
        share = torch.ones_like(lse)
        ctx.rest = _forward(*of_frontier, key, value, output[:, :, frontier.queries], lse, share, below)
        closed = None if frontier.sequences is None else frontier.sequences.closed_rows(len(query))
        if closed is not None:
            # without a frontier they have nothing below it either, and so 0 is their output
            share.masked_fill_(closed, 0)
            output[:, :, frontier.queries].masked_fill_(closed[..., None], 0)
        ctx.save_for_backward(query, key, value, output, lse, share)
        ctx.frontier, ctx.below = frontier, below
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, share = ctx.saved_tensors
        frontier, below = ctx.frontier, ctx.below
        queries, keys = frontier.queries, frontier.keys
        dq = torch.empty_like(query)
        dq[:, :, : query.shape[2] - _below(below)] = 0
        gradient, query, output = (tensor[:, :, queries] for tensor in (gradient, query, output))
        if below.layout.is_empty:
            dk, dv = torch.zeros_like(key), torch.zeros_like(value)
        else:
            last = slice(-_below(below), None)
            q, share_below = query[:, :, last], share[:, :, last]
            of_output, attended = gradient[:, :, last], output[:, :, last]
            whole = Partial(attended, lse[:, :, last], ctx.rest)
            below_dq, dk, dv = below.backward(of_output, q, key, value, whole)
            add_frontier_gradients(
                of_output, q, attended, share_below,
                key[:, :, keys][:, :, last], value[:, :, keys][:, :, last], below.scale, below_dq=below_dq,
                dq=dq[:, :, last], dk=dk[:, :, keys][:, :, last], dv=dv[:, :, keys][:, :, last],
            )  # fmt: skip
        alone = share.shape[2] - _below(below)
        if alone:  # their output is the value of their frontier
            of_values = dv[:, :, keys][:, :, :alone]
            shared = gradient[:, :, :alone] * share[:, :, :alone, None].to(gradient.dtype)  # 0 where closed
            of_values += grouped(shared, dv).sum(2)
        return dq, dk, dv, None, None


def _below(below: Causal) -> int:
    """Queries that are given to the kernel."""
    return max(0, below.layout.queries.stop - below.layout.queries.start)


def _forward(
    query: Tensor,
    frontier: Tensor,
    own_value: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    share: Tensor,
    below: Causal,
) -> Rest:
    """Fills `output` of queries with a frontier. `lse` [b, h, f], at first the scores of frontiers, becomes
    that of the whole softmax, and `share` the frontier's part of it, which is 1 at first. Returns what the
    backward of the part below wants back."""
    alone = query.shape[2] - _below(below)
    if alone:
        grouped(output, key)[:, :, :, :alone] = own_value[:, :, None, :alone]
    if below.layout.is_empty:
        return ()
    query, own_value, output, score, share = (
        tensor[:, :, alone:] for tensor in (query, own_value, output, lse, share)
    )
    partial = below.forward(query, key, value)
    torch.sigmoid(score - partial.lse, out=share)
    torch.logaddexp(partial.lse, score, out=score)
    older = grouped(partial.output, key)
    weight = grouped(share, key)[..., None].to(older.dtype)
    torch.lerp(older, own_value[:, :, None].expand_as(older), weight, out=grouped(output, key))
    return partial.rest


def grouped(heads: Tensor, like: Tensor) -> Tensor:
    """[b, h, ...] to [b, g, h / g, ...], g as in `like` [b, g, ...]."""
    return heads.unflatten(1, (like.shape[1], -1))


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
