"""Attention to keys with a bias where a query sees its newest w keys without it, on PyTorch's CPU kernel.

That kernel rounds the keys of a causal problem up to a multiple of 512, so triangles (`band.py`) cost it as
much as squares; but it takes masks. So queries are taken c at a time, and the keys that they see in at most
three parts, whose softmaxes are joined by their lse. With w = 3, queries 4 .. 7 see

    keys     0 1 2 3 4 5 6 7
    query 4  b b . . .                 b: with bias       .: without
    query 5  b b b . . .
    query 6  b b b b . . .             keys 0 .. 1 are old: all of these queries see them with bias
    query 7  b b b b b . . .           keys 5 .. 7 are young: none does

Old keys have their bias in the last channel. Keys between have it in the mask, and so their kernel has d
channels; but gradients of biases are sums over some of the queries, which no kernel makes. They take two of
its five products once more, c^2 for each block. Of s^2 / 2 products of a query and a key that plain causal
attention makes, blocks make s^2 / 2 + s c / 2, which is what the kernel makes of plain attention.

Shapes: as in `lckv.attention.pieces`; m = b * g groups of r = h / g query heads that share a key, c queries
of a block, n keys of a part.
"""

from collections.abc import Iterator, Sequence
from math import isqrt, log
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.attention.aten_pairs import AtenCPU
from lckv.attention.causal import join, widened
from lckv.attention.flash_pair import Gradients, Partial, Problem
from lckv.attention.sequences import CLOSED
from lckv.attention.unbiased import without_bias

_BLOCK = 192
"""Queries of a block, at most. With more, more of the products are with keys that a query does not see; with
fewer, the kernel makes them more slowly."""


class MaskedBand(NamedTuple):
    """A `pieces.Attention`: `width` w >= 2 newest keys without bias, those below with theirs."""

    width: int
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Output and lse."""
        heads = _Heads(self, query, key, value)
        output, lse = heads.new_of_queries(value.shape[-1]), heads.new_of_queries(1, torch.float32)[..., 0]
        for block in heads.blocks():
            newest, *older = (part.forward() for part in block.parts())
            for part in older:
                join(newest.output, newest.lse, part.output[..., : value.shape[-1]], part.lse)
            output[:, :, block.queries], lse[:, :, block.queries] = newest.output, newest.lse
        return Partial(heads.by_row(output), heads.by_row(lse))

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of query, key and value from that of the output."""
        heads = _Heads(self, query, key, value)
        gradient, output, lse = map(heads.of_queries, (gradient, *whole[:2]))
        whole = Partial(output, lse)
        dq = heads.new_of_queries(query.shape[-1], torch.float32).zero_()
        sums = _Sums(dq, *(torch.zeros_like(part, dtype=dq.dtype) for part in (heads.key, heads.value)))
        for block in heads.blocks():
            for part in block.masked():
                sums.add(part, *part.backward(gradient, whole))
                if part.bias is not None:
                    part.add_of_bias(gradient, whole, sums)
        wide = (widened(tensor, heads.wide) for tensor in (gradient, whole.output))
        gradient, whole = next(wide), whole._replace(output=next(wide))
        for strip in heads.strips():
            sums.add(strip, *strip.backward(gradient, whole))
        dk, dv = (part.unflatten(0, key.shape[:2]).to(key.dtype) for part in (sums.dk, sums.dv))
        return heads.by_row(dq).to(query.dtype), dk, dv


class _Sums(NamedTuple):
    """Gradients of queries [m, r, q, d + e], keys [m, s, d + e] and values [m, s, d]; float32 or float64."""

    dq: Tensor
    dk: Tensor
    dv: Tensor

    def add(self, part: "_Part", dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Of a part, all [m, r, ...]; what they have more channels is 0."""
        self.dq[:, :, part.queries, : dq.shape[-1]] += dq
        for place, of_heads in ((self.dk, dk), (self.dv, dv)):
            channels = min(place.shape[-1], of_heads.shape[-1])
            for member in of_heads.unbind(1):
                place[:, part.keys, :channels] += member[..., :channels]


class _Part(NamedTuple):
    """Queries and keys that they see."""

    queries: slice
    keys: slice
    problem: Problem
    """Of m rows of r heads, whose keys are the same."""

    mask: Tensor | None = None
    """[m or 1, r or 1, c, n]: what is added to scores."""

    bias: "_Bias | None" = None
    """What the mask says of biases."""

    def of(self, heads: Tensor) -> Tensor:
        """Of [m, r, q, ...], those of the queries."""
        return heads[:, :, self.queries]

    def forward(self) -> Partial:
        """Output and lse."""
        return AtenCPU().forward(self.problem, self.mask)

    def backward(self, gradient: Tensor, whole: Partial) -> Gradients:
        """Gradients of query, key and value, each [m, r, ...], from that of the output of all queries."""
        attended = Partial(self.of(whole.output), self.of(whole.lse))
        return AtenCPU().backward(self.of(gradient), self.problem, attended, self.mask)

    def add_of_bias(self, gradient: Tensor, whole: Partial, sums: _Sums) -> None:
        """Add what comes through the mask's biases to the last channels of queries and keys."""
        query, key, value, scale, *_ = self.problem
        bias, mask = self.bias, self.mask
        assert bias is not None
        assert mask is not None
        gradient, output, lse = map(self.of, (gradient, *whole[:2]))
        weights = bias.products(0, query, key).mul_(scale).add_(mask).sub_(lse[..., None])
        # What is lower is no normal number, for which exp takes several times as long.
        weights.clamp_(min=log(torch.finfo(weights.dtype).tiny) + 1).exp_()
        delta = (gradient * output).sum(-1, keepdim=True, dtype=weights.dtype)
        dscores = bias.products(1, gradient, value).sub_(delta).mul_(weights).mul_(bias.seen)
        self.of(sums.dq)[..., -1:] += (dscores @ bias.of_key.mT).mul_(scale)
        of_key = dscores.flatten(1, 2).mT @ bias.constant.flatten(1, 2)
        sums.dk[:, self.keys, -1:] += of_key.mul_(scale)


class _Bias(NamedTuple):
    """Of keys that some queries of a block see with their bias, float32 or float64."""

    constant: Tensor
    """[m, r, c, 1], the last channel of queries."""

    of_key: Tensor
    """[m, 1, 1, n], the last channel of keys."""

    seen: Tensor
    """[c, n]: 1 where the query sees the key with its bias, else 0."""

    memory: Sequence[Tensor]
    """[m * r * c * n or more], for results."""

    def _result(self, number: int) -> Tensor:
        """Memory for [m, r, c, n]."""
        shape = *self.constant.shape[:3], self.of_key.shape[-1]
        return self.memory[number][: torch.Size(shape).numel()].view(shape)

    def scores(self, scale: float) -> Tensor:
        """[m, r, c, n]."""
        return torch.mul(self.constant * scale, self.of_key, out=self._result(2)).mul_(self.seen)

    def products(self, number: int, query: Tensor, key: Tensor) -> Tensor:
        """[m, r, c, n] of [m, r, c, d] and [m, r, n, d], of which all r are the same."""
        result = self._result(number)
        rows, keys = query.flatten(1, 2).to(result.dtype), key[:, 0].to(result.dtype)
        torch.bmm(rows, keys.mT, out=result.flatten(1, 2))
        return result


class _Heads:
    """Queries [m, r, q, ...], keys and values [m, s, ...] of a piece, and where their parts are."""

    def __init__(self, band: MaskedBand, query: Tensor, key: Tensor, value: Tensor) -> None:
        self._batch = key.shape[:2]
        self.query, self.key, self.value = self.of_queries(query), key.flatten(0, 1), value.flatten(0, 1)
        extra = key.shape[-1] - value.shape[-1]
        self.unbiased = without_bias(self.query, extra), without_bias(self.key, extra)
        """Query and key of d channels."""
        self.wide = widened(self.value, self.key)
        """The values with as many channels as keys."""
        self.scale, self.width = band.scale, band.width
        self.older = key.shape[2] - query.shape[2]
        """Keys before that of the first query."""
        # A mask has one number for each query of a block and each key of a part: not more than queries have.
        self.size = min(_BLOCK, isqrt(query.shape[2] * value.shape[-1]), query.shape[2])
        """c."""
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        ones = torch.ones(self.size, self.size + self.width - 1, dtype=self.dtype)
        self.seen = ones[:, : self.size].tril(-1)
        """[c, c] of the first queries of a block, and keys from w - 1 places behind that of the first query
        on: 1 where they are seen with bias."""
        self.future = ones.mul_(CLOSED).triu_(self.width)
        """[c, c + w - 1] of the same: what is added to scores. It is finite: if no key of a part is seen, the
        lse of the part is so low that it counts nothing."""
        entries = self.query[:, :, : self.size, 0].numel() * self.size
        self.memory = [self.query.new_empty(entries, dtype=self.dtype) for _ in range(3)]
        """See `_Bias`."""

    def of_queries(self, heads: Tensor) -> Tensor:
        """[b, h, q, ...] to [m, r, q, ...]."""
        return heads.unflatten(1, (self._batch[1], -1)).flatten(0, 1)

    def by_row(self, heads: Tensor) -> Tensor:
        """The inverse of `of_queries`."""
        return heads.unflatten(0, self._batch).flatten(1, 2)

    def new_of_queries(self, channels: int, least: torch.dtype | None = None) -> Tensor:
        """[m, r, q, channels], tokens first in memory, as the model has them."""
        groups, members, queries, _ = self.query.shape
        dtype = self.query.dtype if least is None else torch.promote_types(self.query.dtype, least)
        return self.query.new_empty(queries, groups, members, channels, dtype=dtype).permute(1, 2, 0, 3)

    def blocks(self) -> Iterator["_Block"]:
        """All queries."""
        queries = self.query.shape[2]
        for start in range(0, queries, self.size):
            yield _Block(self, slice(start, min(start + self.size, queries)))

    def strips(self) -> Iterator[_Part]:
        """The old keys of all blocks, each once, with all queries of the blocks for which they are old."""
        start = 0
        for block in self.blocks():
            if block.old > start:
                queries = slice(block.queries.start, None)
                yield self.old(queries, slice(start, block.old))
                start = block.old

    def old(self, queries: slice, keys: slice) -> _Part:
        """Keys that are old for all of the queries."""
        return _Part(queries, keys, self.problem(queries, keys, self.query, self.key, self.wide))

    def problem(self, queries: slice, keys: slice, query: Tensor, key: Tensor, value: Tensor) -> Problem:
        """Of tensors [m, r, q, ...] and [m, s, ...]."""
        key, value = (tensor[:, None, keys].expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
        return Problem(query[:, :, queries], key, value, self.scale, causal=False)


class _Block:
    """Some queries."""

    def __init__(self, heads: _Heads, queries: slice) -> None:
        self._heads, self.queries = heads, queries
        self._first = heads.older + queries.start + 1 - heads.width
        """Key of the first column of `_Heads.seen`, which may be before all keys."""
        self._stop = heads.older + queries.stop
        """Where the keys that they see end."""
        self.old, self._young = max(0, self._first), max(0, self._stop + 1 - heads.width)
        """Keys before the one are old, from the other on they are young. (The one before that is young, too,
        but w - 1 keys, and as many between as queries, are more often multiples of what a processor adds at
        once.)"""

    def parts(self) -> Iterator[_Part]:
        """Those with keys."""
        yield from self.masked()
        if self.old:
            yield self._heads.old(self.queries, slice(0, self.old))

    def masked(self) -> Iterator[_Part]:
        """Those whose keys are not old."""
        heads = self._heads
        young, between = slice(self._young, self._stop), slice(self.old, self._young)
        yield _Part(self.queries, young, self._problem(young), self._columns(heads.future, young)[None, None])
        if between.start < between.stop:
            bias = self._bias(between)
            mask = bias.scores(heads.scale).add_(self._columns(heads.future, between))
            yield _Part(self.queries, between, self._problem(between), mask, bias)

    def _problem(self, keys: slice) -> Problem:
        return self._heads.problem(self.queries, keys, *self._heads.unbiased, self._heads.value)

    def _columns(self, masks: Tensor, keys: slice) -> Tensor:
        """[c, n] of `_Heads.seen` or `_Heads.future`."""
        size = self.queries.stop - self.queries.start
        return masks[:size, keys.start - self._first : keys.stop - self._first]

    def _bias(self, keys: slice) -> _Bias:
        heads = self._heads
        constant, of_key = heads.query[:, :, self.queries, -1:], heads.key[:, None, None, keys, -1]
        seen = self._columns(heads.seen, keys)
        return _Bias(constant.to(heads.dtype), of_key.to(heads.dtype), seen, heads.memory)
