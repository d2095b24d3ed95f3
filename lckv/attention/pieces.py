"""Tokens that attend to each other, and attention to them piece by piece.

Shapes: b rows, h query heads, g KV heads, s tokens of a row, of which the last q have queries; query [b, h,
q, d + e], key [b, g, s, d + e], value [b, g, s, d], result [b, h, q, d].
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.attention.flash_pair import Gradients, Partial
from lckv.attention.sequences import Piece
from lckv.attention.visibility import Documents, Visibility


def pieces_of(query: Tensor, key: Tensor, visibility: Visibility) -> Iterator[Piece]:
    """Documents, or rows together, windows not counted. Where queries do not see themselves, each stands in
    the place of the one before. Pieces have no tokens in common; queries that see nothing are in none."""
    rows, length, behind = key.shape[0], key.shape[2], int(visibility.exclude_self)
    older = length - query.shape[2]
    for of_rows, start, stop in _spans(visibility.documents, rows, length):
        first = max(start + behind, older)
        if stop > first:
            yield Piece(of_rows, slice(first - older, stop - older), slice(start, stop - behind))


def _spans(documents: Documents | None, rows: int, length: int) -> Iterator[tuple[slice, int, int]]:
    """Rows, and where their tokens that attend to each other start and stop."""
    if documents is None or len(documents.bounds) - 1 == rows:
        yield slice(0, rows), 0, length
        return
    for row, start, stop in documents.spans(length):
        yield slice(row, row + 1), start, stop


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
        output, lse = _Whole(query[..., : value.shape[-1]]), _Whole(query[..., 0])
        ctx.rests = []
        for piece in pieces:
            partial = attention.forward(*piece.of_queries(query), *piece.of_keys(key, value))
            output.put(partial.output, piece.of_queries)
            lse.put(partial.lse, piece.of_queries)
            ctx.rests.append(partial.rest)
        attended = output.tensor(), lse.tensor()
        ctx.save_for_backward(query, key, value, *attended)
        ctx.pieces, ctx.attention = pieces, attention
        return attended[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        dq, dk, dv = (_Whole(tensor) for tensor in (query, key, value))
        for piece, rest in zip(ctx.pieces, ctx.rests, strict=True):
            of_output, q, *attended = piece.of_queries(gradient, query, output, lse)
            whole = Partial(attended[0], attended[1], rest)
            parts = ctx.attention.backward(of_output, q, *piece.of_keys(key, value), whole)
            dq.put(parts[0], piece.of_queries)
            dk.put(parts[1], piece.of_keys)
            dv.put(parts[2], piece.of_keys)
        return dq.tensor(), dk.tensor(), dv.tensor(), None, None


class _Whole:
    """A tensor that is put together of what pieces say; zeros elsewhere. What is the whole is not copied."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._tensor: Tensor | None = None

    def put(self, part: Tensor, place: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """`place`: the method of the piece that finds the part's place in the whole."""
        if part.shape == self._like.shape:
            self._tensor = part
            return
        if self._tensor is None:
            self._tensor = torch.zeros_like(self._like, dtype=part.dtype)
        place(self._tensor)[0].copy_(part)

    def tensor(self) -> Tensor:
        """The whole."""
        return torch.zeros_like(self._like) if self._tensor is None else self._tensor
