"""Attention to keys with a bias on their score, at the cost of plain causal flash attention.

Channel d - 1 of a key is its bias and channel d - 1 of a query the constant that brings it to the score, so
any flash kernel adds it. But a query sees its newest key, its frontier, without bias: key t, or key t - 1
where query t does not see itself. So the kernel gets the keys below the frontier only, which is again a
causal problem, one query shorter:

    keys     0 1 2 3 4
    query 0  F                 F: the frontier, one dot product per query, joined to the kernel's softmax by its lse
    query 1  x F
    query 2  x x F             x: the kernel, on queries 1 .. s-1 and keys 0 .. s-2
    query 3  x x x F
    query 4  x x x x F

The kernel's backward is given the output and the logsumexp of the whole softmax and so returns exactly the
gradients through the keys below the frontier. Nothing of size s x s is made.

Shapes: b rows, h query heads, g KV heads, s tokens, d channels; query [b, h, s, d], key and value [b, g, s,
d].
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.attention.flash_pairs import Attended, FlashPair
from lckv.attention.visibility import Visibility


class _Piece(NamedTuple):
    """Tokens that attend to each other, where query i of `queries` has its frontier at key i of `keys`."""

    rows: slice
    queries: slice
    keys: slice


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dropout: float,
    pair: FlashPair,
) -> Tensor:
    """Same contract as `reference.attend` with `biased`. Raises ValueError for a window and for dropout,
    which it does not have."""
    if visibility.window is not None:
        raise ValueError(
            f"compression.sliding_window is {visibility.window}; there are no sliding windows over merged "
            "tokens "
            "(compression.policy.name dmc): remove the 's' in compression.layer_types."
        )
    if dropout > 0:
        raise ValueError(
            f"model.attention_dropout is {dropout}; it must be 0 where tokens are merged "
            "(compression.policy.name dmc)."
        )
    return _Biased.apply(query, key, value, scale, list(_pieces(query, visibility)), pair)


def _pieces(query: Tensor, visibility: Visibility) -> Iterator[_Piece]:
    documents, (rows, _, length, _) = visibility.documents, query.shape
    behind = int(visibility.exclude_self)
    if documents is None or len(documents.bounds) - 1 == rows:
        spans = [(slice(0, rows), 0, length)]
    else:
        spans = [(slice(row, row + 1), start, stop) for row, start, stop in documents.spans(length)]
    for row, start, stop in spans:
        if stop - start > behind:
            yield _Piece(row, slice(start + behind, stop), slice(start, stop - behind))


def _grouped(heads: Tensor, like: Tensor) -> Tensor:
    """[b, h, ...] to [b, g, h / g, ...], g as in `like` [b, g, ...]."""
    return heads.unflatten(1, (like.shape[1], -1))


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        pieces: list[_Piece],
        pair: FlashPair,
    ) -> Tensor:
        output = torch.zeros_like(query)
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse, share = (torch.empty(query.shape[:-1], dtype=dtype, device=query.device) for _ in range(2))
        ctx.rests = []
        for rows, queries, keys in pieces:
            q, *results = (tensor[rows, :, queries] for tensor in (query, output, lse, share))
            k, v = (tensor[rows, :, keys] for tensor in (key, value))
            ctx.rests.append(_forward(q, k, v, *results, scale=scale, pair=pair))
        ctx.save_for_backward(query, key, value, output, lse, share)
        ctx.scale, ctx.pieces, ctx.pair = scale, pieces, pair
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, share = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for (rows, queries, keys), rest in zip(ctx.pieces, ctx.rests, strict=True):
            of_queries = (tensor[rows, :, queries] for tensor in (gradient, query, output, lse, share, dq))
            of_keys = (tensor[rows, :, keys] for tensor in (key, value, dk, dv))
            _backward(*of_queries, *of_keys, rest=rest, scale=ctx.scale, pair=ctx.pair)
        return dq, dk, dv, None, None, None


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    share: Tensor,
    *,
    scale: float,
    pair: FlashPair,
) -> tuple[Any, ...]:
    """Fills `output` and, except for query 0, `lse` and `share` [b, h, s], the frontier's part of the
    softmax. Returns what the pair's backward wants back."""
    _grouped(output, key)[:, :, :, 0] = value[:, :, None, 0]
    if query.shape[2] == 1:
        return ()
    below, below_lse, rest = pair.forward(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], scale)
    output, lse, share = (tensor[:, :, 1:] for tensor in (output, lse, share))
    products = _grouped(query[:, :, 1:], key).to(lse.dtype) * key[:, :, None, 1:]
    score = products[..., :-1].sum(-1).flatten(1, 2) * scale
    torch.logaddexp(below_lse, score, out=lse)
    torch.sigmoid(score - below_lse, out=share)
    below = _grouped(below, key)
    weight = _grouped(share, key)[..., None].to(below.dtype)
    torch.lerp(below, value[:, :, None, 1:].expand_as(below), weight, out=_grouped(output, key))
    return rest


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
    rest: tuple[Any, ...],
    scale: float,
    pair: FlashPair,
) -> None:
    """Fills dq, dk and dv, which are zeros."""
    dv[:, :, 0] = _grouped(gradient, key)[:, :, :, 0].sum(2)
    if query.shape[2] == 1:
        return
    gradient, query, output, lse, share, dq = (
        tensor[:, :, 1:] for tensor in (gradient, query, output, lse, share, dq)
    )
    below_dq, below_dk, below_dv = pair.backward(
        gradient, query, key[:, :, :-1], value[:, :, :-1], Attended(output, lse, rest), scale
    )
    dk[:, :, :-1] += below_dk
    dv[:, :, :-1] += below_dv
    # The frontier's terms are added in all channels; then the last one, which it is seen without, gets its
    # own back.
    bias_gradient = dk[..., -1].clone()
    gradient, query, output, share = (_grouped(tensor, key) for tensor in (gradient, query, output, share))
    value, key = value[:, :, None, 1:], key[:, :, None, 1:]
    dscore = share * (gradient * (value - output)).sum(-1, dtype=share.dtype) * scale
    share, dscore = (tensor[..., None].to(query.dtype) for tensor in (share, dscore))
    torch.addcmul(_grouped(below_dq, dk), dscore, key, out=_grouped(dq, dk))
    dq[..., -1] = below_dq[..., -1]
    for member in range(query.shape[2]):
        dk[:, :, 1:].addcmul_(dscore[:, :, member], query[:, :, member])
        dv[:, :, 1:].addcmul_(share[:, :, member], gradient[:, :, member])
    dk[..., -1] = bias_gradient
