"""Tokens of rows that see only those of their own sequence, and how the last queries of rows see keys behind
them.

Where queries do not see their newest keys, each stands in the place of an older one. Then the first queries
of a document stand where the last keys of the document before are. They are sequences of their own, which
are closed: what a kernel computes there is dropped. So nothing is gathered. With documents of 3 and 4 tokens,
and one key behind:

    tokens     0 1 2 | 3 4 5 6
    query        1 2   3 4 5 6       1 in the place of 0, and so on
    key          0 1   2 3 4 5
    sequence     a a   x b b b       x: closed, query 3 does not see key 2

Shapes: b rows, s tokens of a row, of which the last q have queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lckv.attention.visibility import Documents, Remembering, to_device

CLOSED = -1e30
"""lse of a query that sees nothing: exp of it is 0, and no difference of two is NaN."""


@dataclass(frozen=True, eq=False)
class Sequences(Remembering):
    """Sequences in rows of equal length, one row after the other."""

    bounds: np.ndarray
    """int64 [n + 1]: where each starts, and the number of all tokens at the end."""

    is_closed: np.ndarray
    """bool [n]: those whose queries see nothing."""

    device: torch.device

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [n + 1]: the bounds on the device."""
        return to_device(torch.tensor(self.bounds.tolist(), dtype=torch.int32), self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens."""
        return int(self.lengths.max())

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each."""
        return np.diff(self.bounds)

    @cached_property
    def closed(self) -> Tensor | None:
        """int64 [c] on the device: tokens of closed sequences; None: there are none."""
        if not self.is_closed.any():
            return None
        places = np.flatnonzero(np.repeat(self.is_closed, self.lengths))
        return to_device(torch.tensor(places.tolist(), dtype=torch.int64), self.device)

    def closed_rows(self, rows: int) -> Tensor | None:
        """bool [b, 1, s] on the device: those tokens, b = `rows`."""
        if self.closed is None:
            return None
        closed = self.closed
        places = torch.zeros(int(self.bounds[-1]), dtype=torch.bool, device=self.device)
        return self.once("rows", lambda: places.index_fill_(0, closed, True).view(rows, 1, -1))

    def close(self, tokens: Tensor, value: float) -> Tensor:
        """Fill `tokens` [b s, ...] with `value` where they are closed."""
        return tokens if self.closed is None else tokens.index_fill_(0, self.closed, value)


class Piece(NamedTuple):
    """Some of the queries and keys."""

    rows: slice
    queries: slice
    keys: slice

    def of_queries(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The piece's part [rows, h, queries, ...] of tensors [b, h, q, ...]."""
        return tuple(tensor[self.rows, :, self.queries] for tensor in tensors)

    def of_keys(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The piece's part [rows, g, keys, ...] of tensors [b, g, s, ...]."""
        return tuple(tensor[self.rows, :, self.keys] for tensor in tensors)


class Layout(NamedTuple):
    """How queries see keys that are some places behind them: as many keys as queries causally, and what is
    before these in full rectangles."""

    queries: slice
    """Of the q: the others see nothing."""

    keys: slice
    """Of the s: as many as `queries`, causally."""

    sequences: Sequences | None
    """Of these; None: each row is one."""

    before: tuple[Piece, ...]
    """`queries` counted from the first of the above."""

    @property
    def is_empty(self) -> bool:
        """Whether no query sees anything."""
        return self.queries.start >= self.queries.stop


def layout_of(documents: Documents | None, rows: int, tokens: int, queries: int, behind: int) -> Layout:
    """Of b `rows` of s `tokens` and q `queries`, which see keys of their document that are `behind` or more
    places behind them."""
    if documents is None or len(documents.bounds) - 1 == rows:
        return _layout(None, rows, tokens, queries, behind)
    place = "layout", tokens, queries, behind
    return documents.once(place, lambda: _layout(documents, rows, tokens, queries, behind))


def sequences_of(documents: Documents, tokens: int, behind: int) -> Sequences:
    """Of all rows as one of so many `tokens`, whose queries are all but the first `behind`."""
    place = "sequences", behind
    return documents.once(place, lambda: _sequences(documents, tokens, first=behind, behind=behind))


def _layout(documents: Documents | None, rows: int, tokens: int, queries: int, behind: int) -> Layout:
    older = tokens - queries
    first = max(behind, older)  # token whose query is the first that sees anything
    seeing, keys = slice(first - older, queries), slice(max(first - behind, 0), tokens - behind)
    if first >= tokens:
        return Layout(seeing, keys, None, ())
    if documents is None:
        whole = Piece(slice(0, rows), slice(0, tokens - first), slice(0, first - behind))
        return Layout(seeing, keys, None, (whole,) if first > behind else ())
    sequences: Sequences | None = _sequences(documents, tokens, first, behind)
    assert sequences is not None
    if sequences.is_closed.all():
        nothing = slice(queries, queries)
        return Layout(nothing, nothing, None, ())
    if len(sequences.lengths) == rows and not sequences.is_closed.any():
        sequences = None  # rows
    return Layout(seeing, keys, sequences, tuple(_before(documents, rows, tokens, first, behind)))


def _sequences(documents: Documents, tokens: int, first: int, behind: int) -> Sequences:
    """Of rows of so many `tokens`, whose queries are those from `first` on."""
    documents.spans(tokens)  # refuses what crosses the end of a row
    rows, length = documents.bounds[-1] // tokens, tokens - first
    bounds = np.asarray(documents.bounds, dtype=np.int64)
    row, start = np.divmod(bounds[:-1], tokens)
    stop = start + np.diff(bounds)
    # of the queries of each document: the first that sees a key in these places, and behind the last
    opens = row * length + (np.maximum(start + behind, first) - first)
    ends = row * length + np.maximum(stop - first, 0)
    opens = opens[opens < ends]
    bounds = np.unique(np.concatenate((opens, ends, [0, rows * length])))
    is_closed = ~np.isin(bounds[:-1], opens)
    return Sequences(bounds, is_closed, documents.cu_seqlens.device)


def _before(documents: Documents, rows: int, tokens: int, first: int, behind: int) -> Iterator[Piece]:
    """Of each row at most one document goes on beyond the first query's newest key."""
    if first == behind:
        return
    for row in range(rows):
        start, stop = documents.around(tokens, row, first)
        if start < first - behind:
            yield Piece(slice(row, row + 1), slice(0, stop - first), slice(start, first - behind))
