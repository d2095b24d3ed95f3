"""Causal attention of the last queries of rows to keys that are some places behind them, on a pair of flash
kernels.

Keys may be n longer than queries. Then every query sees the first n keys of its document, and the rest of the
keys causally:

    keys     0 1 2 3 4
    query 0  p p o             p: the past, the first n = 2 keys, a full rectangle
    query 1  p p o o           o: own keys, as many as queries
    query 2  p p o o o

The two softmaxes are joined by their lse. Each part's backward is given the output and the lse of the whole
softmax and so returns exactly the gradients through its own keys. No kernel is asked how it aligns a causal
rectangle, on which kernels differ. The kernels make the products of queries and keys that are drawn, no more.
Own keys of all documents are one call (`sequences.py`); the past is at most one rectangle for each row.

Shapes: query [b, h, q, d + e] of those that see anything, q <= s; key [b, g, s, d + e], value [b, g, s, d],
output and its gradient [b, h, q, d], lse [b, h, q].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lckv.attention.flash_pair import FlashPair, Gradients, Partial, Problem
from lckv.attention.sequences import Layout, Piece

Rest = tuple[Any, ...]
"""What a backward wants back."""


class Causal(NamedTuple):
    """Attention as a layout says. Values may have fewer channels than keys, which kernels do not take: they
    get zeros."""

    pair: FlashPair
    scale: float
    layout: Layout

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Output and lse, of the layout's queries."""
        wide = widened(value, key)
        own = self.pair.forward(self._own(query, key, wide))
        rests = [own.rest]
        for before in self.layout.before:
            older = self.pair.forward(self._before(before, query, key, wide))
            output, lse = before.of_queries(own.output, own.lse)
            join(output, lse, older.output, older.lse)
            rests.append(older.rest)
        return Partial(own.output[..., : value.shape[-1]], own.lse, tuple(rests))

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of the layout's queries and of all keys and values from that of the output of the whole
        softmax."""
        wide, gradient, output = (widened(tensor, key) for tensor in (value, gradient, whole.output))
        own_rest, *rests = whole.rest
        partial = Partial(output, whole.lse, own_rest)
        dq, *of_keys = self.pair.backward(gradient, self._own(query, key, wide), partial)
        dk, dv = (_whole(part, key, self.layout.keys) for part in of_keys)
        for before, rest in zip(self.layout.before, rests, strict=True):
            of_output, *attended = before.of_queries(gradient, output, whole.lse)
            partial = Partial(attended[0], attended[1], rest)
            problem = self._before(before, query, key, wide)
            parts = self.pair.backward(of_output, problem, partial)
            places = *before.of_queries(dq), *before.of_keys(dk, dv)
            for place, part in zip(places, parts, strict=True):
                place += part
        return dq, dk, dv[..., : value.shape[-1]]

    def _own(self, query: Tensor, key: Tensor, wide: Tensor) -> Problem:
        keys, sequences = self.layout.keys, self.layout.sequences
        return Problem(query, key[:, :, keys], wide[:, :, keys], self.scale, True, sequences)

    def _before(self, before: Piece, query: Tensor, key: Tensor, wide: Tensor) -> Problem:
        (queries,), (keys, values) = before.of_queries(query), before.of_keys(key, wide)
        return Problem(queries, keys, values, self.scale, causal=False)


class Full(NamedTuple):
    """Attention of every query to all keys, else as `Causal`."""

    pair: FlashPair
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Output and lse."""
        partial = self.pair.forward(Problem(query, key, widened(value, key), self.scale, causal=False))
        return partial._replace(output=partial.output[..., : value.shape[-1]])

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of query, key and value from that of the output of the whole softmax."""
        problem = Problem(query, key, widened(value, key), self.scale, causal=False)
        whole = whole._replace(output=widened(whole.output, key))
        dq, dk, dv = self.pair.backward(widened(gradient, key), problem, whole)
        return dq, dk, dv[..., : value.shape[-1]]


def attend_causal(query: Tensor, key: Tensor, value: Tensor, causal: Causal) -> Tensor:
    """[b, h, q, d] of all queries; 0 for those that see nothing."""
    return _Causal.apply(query, key, value, causal)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: Causal) -> Tensor:
        ctx.causal = causal
        if causal.layout.is_empty:
            ctx.save_for_backward(query, key, value)
            return torch.zeros_like(query[..., : value.shape[-1]])
        queries = causal.layout.queries
        output, lse, ctx.rest = causal.forward(query[:, :, queries], key, value)
        output = _whole(output, query[..., : value.shape[-1]], queries)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *attended = ctx.saved_tensors
        if not attended:
            return *(torch.zeros_like(tensor) for tensor in (query, key, value)), None
        queries = ctx.causal.layout.queries
        whole = Partial(attended[0][:, :, queries], attended[1], ctx.rest)
        dq, dk, dv = ctx.causal.backward(gradient[:, :, queries], query[:, :, queries], key, value, whole)
        return _whole(dq, query, queries), dk, dv, None


def join(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make `output` [..., s, d] and `lse` [..., s] those of their keys and the other's."""
    share = torch.sigmoid(other_lse - lse)[..., None].to(output.dtype)
    output.lerp_(other, share)
    torch.logaddexp(lse, other_lse, out=lse)


def widened(tensor: Tensor, like: Tensor) -> Tensor:
    """[..., d] to [..., d + e], with zeros, e as in `like`."""
    extra = like.shape[-1] - tensor.shape[-1]
    return pad(tensor, (0, extra)) if extra else tensor


def _whole(part: Tensor, like: Tensor, place: slice) -> Tensor:
    """[b, heads, n, ...] of tokens `place` to all tokens of `like`, with zeros; not copied where n is all."""
    if part.shape[2] == like.shape[2]:
        return part
    whole = torch.empty_like(like[..., : part.shape[-1]], dtype=part.dtype)
    whole[:, :, place] = part
    for rest in (whole[:, :, : place.start], whole[:, :, place.stop :]):
        if rest.shape[2]:
            rest.zero_()
    return whole
