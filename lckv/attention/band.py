"""Attention to keys with a bias where a query sees its newest w keys without it, for w >= 2.

Keys below the band are one causal problem, w queries shorter. The band itself is cut into chunks of w tokens.
A query sees its own chunk causally; and of the chunk before the keys that lie behind its own place, which is
a causal problem again when both chunks are read backwards, one query shorter. With w = 3:

    keys     0 1 2 3 4 5 6 7            query 3, place 0 of its chunk, sees places 1 and 2 of the
    query 0  o                          chunk before, query 4 place 2, query 5 none. Backwards:
    query 1  o o
    query 2  o o o                          keys     2 1
    query 3  b p p o                        query 4  p
    query 4  b b p o o                      query 3  p p
    query 5  b b b o o o
    query 6  b b b b p p o              o: own chunk, p: chunk before, b: below the band, with bias
    query 7  b b b b b p o o

All chunks of a kind are one call, side by side in the batch. Of s^2 / 2 products of a query and a key that
plain causal attention makes, the kernels make (s - w)^2 / 2 below the band, s w / 2 in own chunks and s w / 2
in chunks before: together s^2 / 2 + w^2 / 2.

Where a piece has more keys than queries, min(w - 1, as many) zeros stand in front of the queries of the band,
so that query and key of a token have the same place again.

Shapes: as in `lckv.attention.biased`; here q are the queries of a piece and s its keys, t the tokens of the
band, c those of a chunk, n chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.causal import Causal, Rest, join
from lckv.attention.flash_pair import FlashPair, Gradients, Partial, Problem
from lckv.attention.sequences import layout_of
from lckv.attention.unbiased import without_bias


class _Rests(NamedTuple):
    """What the backward of each part wants back; None where there is no such part."""

    own: Rest
    before: Rest | None
    below: Rest | None


class Banded(NamedTuple):
    """A `pieces.Attention`: `width` w >= 2 newest keys without bias, those below with theirs."""

    width: int
    pair: FlashPair
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Output and lse of the whole."""
        band = _Band(self.width, query, key)
        chunks = band.chunks(query, key, value)
        own = self.pair.forward(self._causal(*band.own(*chunks)))
        rests = _Rests(own.rest, None, None)
        output, lse = (band.from_own(tensor) for tensor in own[:2])
        if band.count > 1:
            before = self.pair.forward(self._causal(*band.before(*chunks)))
            place = band.second(output), band.second(lse)
            join(*place, band.from_before(before.output), band.from_before(before.lse))
            rests = rests._replace(before=before.rest)
        output, lse = band.of_queries(output), band.of_queries(lse)
        if band.below is not None:
            queries, keys = band.below
            late = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            older = self._below(*late[:2]).forward(*late)
            join(output[:, :, queries], lse[:, :, queries], older.output, older.lse)
            rests = rests._replace(below=older.rest)
        return Partial(output, lse, rests)

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of query, key and value from that of the output."""
        band, channels = _Band(self.width, query, key), value.shape[-1]
        _, _, below_rest = whole.rest
        dq, dk, dv = (torch.zeros_like(tensor) for tensor in (query, key, value))
        parts = self._backward_of_band(band, gradient, query, key, value, whole)
        places = dq[..., :channels], dk[:, :, band.keys, :channels], dv[:, :, band.keys]
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)
        if band.below is not None:
            queries, keys = band.below
            late, late_query = gradient[:, :, queries], query[:, :, queries]
            late_whole = Partial(whole.output[:, :, queries], whole.lse[:, :, queries], below_rest)
            older = key[:, :, keys], value[:, :, keys]
            below = self._below(late_query, older[0])
            parts = below.backward(late, late_query, *older, late_whole)
            places = dq[:, :, queries], dk[:, :, keys], dv[:, :, keys]
            for place, part in zip(places, parts, strict=True):
                place += part
        return dq, dk, dv

    def _backward_of_band(
        self, band: "_Band", gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        own_rest, before_rest, _ = whole.rest
        chunks = band.chunks(query, key, value)
        gradient, output, lse = (band.chunked_queries(tensor) for tensor in (gradient, *whole[:2]))
        own = Partial(band.to_own(output), band.to_own(lse), own_rest)
        problem = self._causal(*band.own(*chunks))
        parts = self.pair.backward(band.to_own(gradient), problem, own)
        dq, dk, dv = (band.from_own(part) for part in parts)
        if before_rest is not None:
            late, late_output, late_lse = (
                band.to_before(band.second(tensor)) for tensor in (gradient, output, lse)
            )
            before = Partial(late_output, late_lse, before_rest)
            parts = self.pair.backward(late, self._causal(*band.before(*chunks)), before)
            places = band.second(dq), band.first(dk), band.first(dv)
            for place, part in zip(places, parts, strict=True):
                place += band.from_before(part)
        return band.of_queries(dq), band.whole(dk), band.whole(dv)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Problem:
        return Problem(query, key, value, self.scale, causal=True)

    def _below(self, query: Tensor, key: Tensor) -> Causal:
        """Of the last queries to these keys."""
        return Causal(
            self.pair, self.scale, layout_of(None, len(key), key.shape[2], query.shape[2], behind=0)
        )


class _Band:
    """Indices of the band: tensors [b, heads, t, ...] as chunks [b, n, heads, c, ...], and what the kernel
    gets of them."""

    def __init__(self, width: int, query: Tensor, key: Tensor) -> None:
        queries, keys = query.shape[2], key.shape[2]
        self._lead = min(width - 1, keys - queries)
        """Tokens of the band whose keys are seen and whose queries are another piece's."""
        self._tokens = self._lead + queries
        self._size = min(width, self._tokens)
        self.count = -(-self._tokens // self._size)
        """n."""
        self.keys = slice(keys - self._tokens, keys)
        """Those of the band."""
        self.below: tuple[slice, slice] | None = None
        """Queries and keys of the part below; None where it has none."""
        if keys > width:
            self.below = slice(max(0, width - (keys - queries)), queries), slice(0, keys - width)

    def chunks(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the band, without bias, of d channels."""
        extra = key.shape[-1] - value.shape[-1]
        query, key = without_bias(query, extra), without_bias(key[:, :, self.keys], extra)
        return self.chunked_queries(query), self._chunked(key), self._chunked(value[:, :, self.keys])

    def chunked_queries(self, tensor: Tensor) -> Tensor:
        """[b, heads, q, ...] to [b, n, heads, c, ...]; zeros stand in front."""
        return self._chunked(tensor, self._lead)

    def _chunked(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """[b, heads, t - lead, ...] to [b, n, heads, c, ...];
        zeros stand in front, and where the last chunk has no tokens."""
        missing = self.count * self._size - self._tokens
        if lead or missing:
            tensor = pad(tensor, (*(0, 0) * (tensor.dim() - 3), lead, missing))
        return tensor.unflatten(2, (self.count, self._size)).transpose(1, 2)

    def of_queries(self, chunks: Tensor) -> Tensor:
        """The inverse of `chunked_queries`."""
        return self.whole(chunks)[:, :, self._lead :]

    def whole(self, chunks: Tensor) -> Tensor:
        """[b, n, heads, c, ...] to [b, heads, t, ...]."""
        return chunks.transpose(1, 2).flatten(2, 3)[:, :, : self._tokens]

    def own(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel gets for own chunks."""
        return self.to_own(query), self.to_own(key), self.to_own(value)

    def before(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel gets for chunks before: queries of the second chunk and later ones, all but their
        last place; keys and values of all but the last chunk, all but their first place; backwards."""
        return (
            self.to_before(self.second(query)),
            self.to_before(self.first(key)),
            self.to_before(self.first(value)),
        )

    def second(self, chunks: Tensor) -> Tensor:
        """Places of queries that see keys of the chunk before:
        [b, n, heads, c, ...] to [b, n - 1, heads, c - 1, ...]."""
        return chunks[:, 1:, :, :-1]

    def first(self, chunks: Tensor) -> Tensor:
        """Places of keys that are seen from the chunk behind:
        [b, n, heads, c, ...] to [b, n - 1, heads, c - 1, ...]."""
        return chunks[:, :-1, :, 1:]

    def to_own(self, chunks: Tensor) -> Tensor:
        """[b, n, heads, c, ...] to [b * n, heads, c, ...]."""
        return chunks.flatten(0, 1)

    def from_own(self, folded: Tensor) -> Tensor:
        """The inverse of `to_own`."""
        return folded.unflatten(0, (-1, self.count))

    def to_before(self, places: Tensor) -> Tensor:
        """[b, n - 1, heads, c - 1, ...] to [b * (n - 1), heads, c - 1, ...], backwards."""
        return places.flip(3).flatten(0, 1)

    def from_before(self, folded: Tensor) -> Tensor:
        """The inverse of `to_before`."""
        return folded.unflatten(0, (-1, self.count - 1)).flip(3)
