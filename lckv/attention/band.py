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

Shapes: as in `lckv.attention.biased`; here s are the tokens of a piece, c those of a chunk, n chunks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lckv.attention.flash_pairs import FlashPair, Gradients, Partial
from lckv.attention.pieces import Biased, Piece, Rest
from lckv.attention.unbiased import without_bias


def attend_with_band(
    query: Tensor, key: Tensor, value: Tensor, scale: float, width: int, pieces: list[Piece], pair: FlashPair
) -> Tensor:
    """[b, h, s, d]; 0 for queries that are in no piece. `width`:
    w >= 2, newest keys that are seen without bias."""
    return _Banded.apply(query, key, value, width, pieces, Biased(pair, scale))


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, width: int, pieces: list[Piece], below: Biased
    ) -> Tensor:
        output = query.new_zeros(*query.shape[:-1], value.shape[-1])
        dtype = torch.promote_types(query.dtype, torch.float32)
        lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
        ctx.rests = []
        for piece in pieces:
            (q,), (k, v) = piece.of_queries(query), piece.of_keys(key, value)
            partial, rests = _forward(q, k, v, width, below)
            for place, result in zip(piece.of_queries(output, lse), partial[:2], strict=True):
                place.copy_(result)
            ctx.rests.append(rests)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.width, ctx.pieces, ctx.below = width, pieces, below
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(tensor) for tensor in (query, key, value))
        for piece, rests in zip(ctx.pieces, ctx.rests, strict=True):
            of_queries, of_keys = piece.of_queries(gradient, query, output, lse), piece.of_keys(key, value)
            gradients = piece.of_queries(dq) + piece.of_keys(dk, dv)
            _backward(of_queries, of_keys, gradients, rests, width=ctx.width, below=ctx.below)
        return dq, dk, dv, None, None, None


class _Rests(NamedTuple):
    """What the backward of each part wants back; None where there is no such part."""

    own: Rest
    before: Rest | None
    below: Rest | None


def _forward(query: Tensor, key: Tensor, value: Tensor, width: int, below: Biased) -> tuple[Partial, _Rests]:
    """Output and lse of the whole."""
    band = _Band(width, query.shape[2])
    chunks = band.chunks(query, key, value)
    own = below.pair.forward(*band.own(*chunks), below.scale)
    output, lse = (band.from_own(tensor) for tensor in own[:2])
    if band.count == 1:
        return Partial(band.whole(output), band.whole(lse)), _Rests(own.rest, None, None)
    before = below.pair.forward(*band.before(*chunks), below.scale)
    place = band.second(output), band.second(lse)
    _join(*place, band.from_before(before.output), band.from_before(before.lse))
    output, lse = band.whole(output), band.whole(lse)
    older = below.forward(query[:, :, width:], key[:, :, :-width], value[:, :, :-width])
    _join(output[:, :, width:], lse[:, :, width:], older.output, older.lse)
    return Partial(output, lse), _Rests(own.rest, before.rest, older.rest)


def _join(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make `output` [..., s, d] and `lse` [..., s] those of their keys and the other's."""
    share = torch.sigmoid(other_lse - lse)[..., None].to(output.dtype)
    output.lerp_(other, share)
    torch.logaddexp(lse, other_lse, out=lse)


def _backward(
    of_queries: tuple[Tensor, ...],
    of_keys: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    rests: _Rests,
    *,
    width: int,
    below: Biased,
) -> None:
    """Adds to `gradients`, those of query, key and value. `of_queries` are the output's gradient, query,
    output and lse, `of_keys` key and value."""
    gradient, query, output, lse = of_queries
    key, value = of_keys
    dq, dk, dv = gradients
    if rests.below is not None:
        late_gradient, late_query, late_output, late_lse = (tensor[:, :, width:] for tensor in of_queries)
        older = slice(0, key.shape[2] - width)
        whole = Partial(late_output, late_lse, rests.below)
        parts = below.backward(late_gradient, late_query, key[:, :, older], value[:, :, older], whole)
        for place, part in zip((dq[:, :, width:], dk[:, :, older], dv[:, :, older]), parts, strict=True):
            place += part
    channels = value.shape[-1]
    parts = _backward_of_band(gradient, query, output, lse, key, value, rests, width=width, below=below)
    for place, part in zip((dq[..., :channels], dk[..., :channels], dv), parts, strict=True):
        place += part


def _backward_of_band(
    gradient: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    rests: _Rests,
    *,
    width: int,
    below: Biased,
) -> Gradients:
    band = _Band(width, query.shape[2])
    chunks = band.chunks(query, key, value)
    gradient, output, lse = (band.chunked(tensor) for tensor in (gradient, output, lse))
    own = Partial(band.to_own(output), band.to_own(lse), rests.own)
    parts = below.pair.backward(band.to_own(gradient), *band.own(*chunks), own, below.scale)
    dq, dk, dv = (band.from_own(part) for part in parts)
    if rests.before is not None:
        before = Partial(band.to_before(band.second(output)), band.to_before(band.second(lse)), rests.before)
        late = band.to_before(band.second(gradient))
        parts = below.pair.backward(late, *band.before(*chunks), before, below.scale)
        places = band.second(dq), band.first(dk), band.first(dv)
        for place, part in zip(places, parts, strict=True):
            place += band.from_before(part)
    return band.whole(dq), band.whole(dk), band.whole(dv)


class _Band:
    """Indices of the band: tensors [b, heads, s, ...] as chunks [b, n, heads, c, ...], and what the kernel
    gets of them."""

    def __init__(self, width: int, tokens: int) -> None:
        self._tokens, self._size = tokens, min(width, tokens)
        self.count = -(-tokens // self._size)
        """n."""

    def chunks(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Without bias, of d channels."""
        extra = key.shape[-1] - value.shape[-1]
        query, key = without_bias(query, extra), without_bias(key, extra)
        return self.chunked(query), self.chunked(key), self.chunked(value)

    def chunked(self, tensor: Tensor) -> Tensor:
        """[b, heads, s, ...] to [b, n, heads, c, ...]; zeros stand where the last chunk has no tokens."""
        missing = self.count * self._size - self._tokens
        if missing:
            tensor = pad(tensor, (*(0, 0) * (tensor.dim() - 3), 0, missing))
        return tensor.unflatten(2, (self.count, self._size)).transpose(1, 2)

    def whole(self, chunks: Tensor) -> Tensor:
        """[b, n, heads, c, ...] to [b, heads, s, ...]."""
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
