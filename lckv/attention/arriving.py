"""Attention of some chunks of a row to keys that come chunk by chunk, the own ones first.

A row is cut into equal chunks. Queries are those of some chunks, a part; keys come in parts of as many. The
own part is a row of its own: later tokens stand later there, too. Of another part, a chunk of queries sees
the chunks of keys that lie before it, in full rectangles:

    chunks of keys        0 3 | 1 2
    chunk 0 of queries    o   |           o: own part, causal
    chunk 3 of queries    o o | f f       f: another part, full

Softmaxes are joined by their lse as they come, in float32 at least. In backward each part gets the output and
the lse of the whole softmax and so returns exactly the gradients through its own keys.

Keys may carry a bias that a query sees of all keys but its own, which lies in the own part: that one is a dot
product for each query, its frontier (`frontier.py`).

Shapes: b rows, h query heads, g KV heads, n tokens of a part, c tokens of a chunk, d channels of a value, e
extra channels of queries and keys; query [b, h, n, d + e], key [b, g, n, d + e], value [b, g, n, d], output
[b, h, n, d], lse [b, h, n].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.attention.causal import Causal, Full, Rest, join
from lckv.attention.flash_pair import FlashPair, Partial
from lckv.attention.frontier import add_frontier_gradients, frontier_score, grouped
from lckv.attention.pieces import Attention
from lckv.attention.sequences import Layout, Piece, layout_of
from lckv.attention.visibility import Documents


@dataclass(frozen=True)
class ChunkSight:
    """What queries of the chunks `own` see of a row of `total` chunks."""

    own: tuple[int, ...]
    """Numbers of chunks, from 0, in ascending order."""
    total: int
    rows: int
    """b."""
    chunk: int
    """c."""
    exclude_self: bool = False
    biased: bool = False
    """Whether keys carry a bias, which a query sees of all keys but its own."""
    documents: Documents | None = None
    """Of whole rows."""

    def arrivals(self, others: Sequence[Sequence[int]], pair: FlashPair, scale: float) -> Iterator["Arrival"]:
        """The own part, then those that have the chunks `others`."""
        own = self.own_layout()
        seeing = [] if own.is_empty else [Piece(slice(0, self.rows), own.queries, slice(None))]
        yield Arrival(seeing, Causal(pair, scale, own))
        for keys in others:
            yield Arrival(self.rectangles(keys), Full(pair, scale))

    def own_layout(self) -> Layout:
        """Of the own part, without frontiers: its tokens follow each other there."""
        tokens, documents = len(self.own) * self.chunk, self.documents
        if documents is not None:
            ranges = ((number * self.chunk, (number + 1) * self.chunk) for number in self.own)
            documents = documents.cut(self.total * self.chunk, *ranges)
        return layout_of(documents, self.rows, tokens, tokens, int(self.exclude_self or self.biased))

    def rectangles(self, keys: Sequence[int]) -> list[Piece]:
        """Of the part that has the chunks `keys`, in ascending order. All queries of a piece see all of its
        keys."""
        pieces: list[Piece] = []
        size = self.chunk
        for place, number, rows, start, stop in self._continued():
            seen = [
                (other * size + max(start - before * size, 0), (other + 1) * size)
                for other, before in enumerate(keys)
                if before < number and start < (before + 1) * size
            ]
            if not seen:
                continue
            end = place * size + min(stop - number * size, size)
            piece = Piece(rows, slice(place * size, end), slice(seen[0][0], seen[-1][1]))
            if pieces and _continues(pieces[-1], piece):
                piece = piece._replace(queries=slice(pieces.pop().queries.start, end))
            pieces.append(piece)
        return pieces

    def _continued(self) -> Iterator[tuple[int, int, slice, int, int]]:
        """Place and number of each own chunk, with rows, start and stop of each document that began before it
        and goes on in it."""
        length = self.total * self.chunk
        for place, number in enumerate(self.own):
            if self.documents is None:
                yield place, number, slice(0, self.rows), 0, length
                continue
            for row in range(self.rows):
                yield (
                    place,
                    number,
                    slice(row, row + 1),
                    *self.documents.around(length, row, number * self.chunk),
                )


def _continues(before: Piece, piece: Piece) -> bool:
    """Whether both are one rectangle."""
    same = before.rows == piece.rows and before.keys == piece.keys
    return same and before.queries.stop == piece.queries.start


class Arrival(NamedTuple):
    """What queries see of one part of the keys."""

    pieces: list[Piece]
    attention: Attention

    def join(self, whole: Partial, query: Tensor, key: Tensor, value: Tensor) -> list[Rest]:
        """Make `whole` that of these keys, too. Returns what `add_gradients` wants back."""
        rests = []
        for piece in self.pieces:
            partial = self.attention.forward(*piece.of_queries(query), *piece.of_keys(key, value))
            output, lse = piece.of_queries(whole.output, whole.lse)
            join(output, lse, partial.output.to(output.dtype), partial.lse)
            rests.append(partial.rest)
        return rests

    def add_gradients(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        whole: Partial,
        rests: list[Rest],
        sums: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """To those of query, key and value, from that of the output of the whole softmax."""
        for piece, rest in zip(self.pieces, rests, strict=True):
            of_output, q, output, lse = piece.of_queries(gradient, query, whole.output, whole.lse)
            k, v = piece.of_keys(key, value)
            parts = self.attention.backward(of_output, q, k, v, Partial(output, lse, rest))
            places = *piece.of_queries(sums[0]), *piece.of_keys(*sums[1:])
            for place, part in zip(places, parts, strict=True):
                place += part


def before_arrivals(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, *, biased: bool, scale: float
) -> Partial:
    """What arrivals are joined to: nothing, or frontiers where keys are `biased`; of the own part. It lies in
    `output`."""
    if not biased:
        lse = torch.full(query.shape[:-1], -torch.inf, dtype=output.dtype, device=query.device)
        return Partial(output.zero_(), lse)
    grouped(output, key).copy_(value[:, :, None])  # [b, g, h / g, n, d], all queries of a group alike
    return Partial(output, frontier_score(query, key, scale, output.dtype))


def add_gradients_before_arrivals(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    whole: Partial,
    scale: float,
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Those of the frontiers."""
    share = (frontier_score(query, key, scale, whole.lse.dtype) - whole.lse).exp_()
    nothing, dq = torch.zeros_like(query), torch.empty_like(query)
    add_frontier_gradients(
        gradient, query, whole.output, share, key, value, scale,
        below_dq=nothing, dq=dq, dk=sums[1], dv=sums[2],
    )  # fmt: skip
    sums[0].add_(dq)
