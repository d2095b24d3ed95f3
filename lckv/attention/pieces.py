"""Tokens that attend to each other, and attention to them piece by piece.

Shapes: b rows, h query heads, g KV heads, s tokens of a row, of which the last q have queries; query [b, h,
q, d + e], key [b, g, s, d + e], value [b, g, s, d], result [b, h, q, d].
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.attention.flash_pairs import Gradients, Partial
from lckv.attention.visibility import Visibility


class Piece(NamedTuple):
    """Tokens that attend to each other: query i of `queries` sees keys 0 .. n + i of `keys`, which are n >= 0
    more than the queries."""

    rows: slice
    queries: slice
    keys: slice

    def of_queries(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The piece's part [rows, h, queries, ...] of tensors [b, h, q, ...]."""
        return tuple(tensor[self.rows, :, self.queries] for tensor in tensors)

    def of_keys(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The piece's part [rows, g, keys, ...] of tensors [b, g, s, ...]."""
        return tuple(tensor[self.rows, :, self.keys] for tensor in tensors)


def pieces_of(query: Tensor, key: Tensor, visibility: Visibility) -> Iterator[Piece]:
    """Documents, or rows together, windows not counted. Where queries do not see themselves, each stands in
    the place of the one before. Pieces have no tokens in common; queries that see nothing are in none."""
    documents, behind = visibility.documents, int(visibility.exclude_self)
    rows, length, older = key.shape[0], key.shape[2], key.shape[2] - query.shape[2]
    if documents is None or len(documents.bounds) - 1 == rows:
        spans = [(slice(0, rows), 0, length)]
    else:
        spans = [(slice(row, row + 1), start, stop) for row, start, stop in documents.spans(length)]
    for row, start, stop in spans:
        first = max(start + behind, older)
        if stop > first:
            yield Piece(row, slice(first - older, stop - older), slice(start, stop - behind))


class Attention(Protocol):
    """Attention of the queries of a piece to its keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Output and lse."""
        ...

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of query, key and value from that of the output; `whole` is what `forward` returned."""
        ...


def attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], attention: Attention
) -> Tensor:
    """[b, h, q, d]; 0 for queries that are in no piece."""
    return _Pieces.apply(query, key, value, pieces, attention)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], attention: Attention
    ) -> Tensor:
        output = query.new_zeros(*query.shape[:-1], value.shape[-1])
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
        ctx.rests = []
        for piece in pieces:
            partial = attention.forward(*piece.of_queries(query), *piece.of_keys(key, value))
            for place, result in zip(piece.of_queries(output, lse), partial[:2], strict=True):
                place.copy_(result)
            ctx.rests.append(partial.rest)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.pieces, ctx.attention = pieces, attention
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for piece, rest in zip(ctx.pieces, ctx.rests, strict=True):
            of_output, q, *attended = piece.of_queries(gradient, query, output, lse)
            whole = Partial(attended[0], attended[1], rest)
            parts = ctx.attention.backward(of_output, q, *piece.of_keys(key, value), whole)
            for place, part in zip(piece.of_queries(dq) + piece.of_keys(dk, dv), parts, strict=True):
                place.copy_(part)
        return dq, dk, dv, None, None


def grouped(heads: Tensor, like: Tensor) -> Tensor:
    """[b, h, ...] to [b, g, h / g, ...], g as in `like` [b, g, ...]."""
    return heads.unflatten(1, (like.shape[1], -1))
