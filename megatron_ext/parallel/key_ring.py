"""Attention whose keys and values go round the ranks that share rows, instead of being gathered.

Rank r attends to its own part, then to that of rank r - 1, r - 2, ...: what it has attended to goes on to
rank r + 1. While it attends to one part, that part leaves and the next one arrives:

    rank 0    own part     that of 2    that of 1
    rank 1    own part     that of 0    that of 2
    rank 2    own part     that of 1    that of 0

In backward they go round again. The gradients of a part follow it by one step, each rank adds its own, and a
last step brings them home. Every rank sends and receives the same at the same time, in the same order.

Shapes: n tokens of a rank, b rows, h query heads, g KV heads, d channels of a value, e extra channels; query
[n, b, h, d + e], key [n, b, g, d + e], value [n, b, g, d].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.attention.arriving import Arrival, ChunkSight, add_gradients_before_arrivals, before_arrivals
from lckv.attention.causal import Rest
from lckv.attention.flash_pair import FlashPair, Partial
from lckv.attention.visibility import Documents
from megatron_ext.parallel.chunks import Chunks

_KEYS_VALUES, _GRADIENTS = 0, 1
"""Tags of messages: what two ranks send each other at the same time must not be confused."""


class KeyRing:
    """The ranks that share rows, one behind the other, seen from one of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.ranks, self.rank = group.size(), group.rank()

    @property
    def owners(self) -> list[int]:
        """Whose keys and values this rank attends to, in this order."""
        return [(self.rank - step) % self.ranks for step in range(self.ranks)]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents | None,
        *,
        exclude_self: bool,
        biased: bool,
        scale: float,
        pair: FlashPair,
    ) -> Tensor:
        """[n, b, h, d], of the rank's tokens to those of whole rows, which `documents` are of. `biased`: see
        `ChunkSight`."""
        chunks = Chunks(self.ranks, self.rank)
        rows, chunk = query.shape[1], len(query) // len(chunks.numbers)
        sight = ChunkSight(chunks.numbers, chunks.total, rows, chunk, exclude_self, biased, documents)
        return _Attend.apply(query, key, value, self, _Attention(sight, pair, scale))

    def round(self, own: Tensor) -> Iterator[Tensor]:
        """`own`, then what each of the other `owners` has of the same shape. While one is used it goes on,
        and the next one arrives; what was used before is overwritten."""
        here, arriving = own, torch.empty_like(own)
        for _ in range(self.ranks - 1):
            works = self.send_on(here, arriving, _KEYS_VALUES)
            yield here
            _wait(works)
            here, arriving = arriving, here
        yield here

    def send_on(self, leaving: Tensor, arriving: Tensor, tag: int) -> list[dist.Work]:
        """Start to send to the rank behind this one and to receive from the one before."""
        behind, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, leaving, group=self._group, group_peer=behind, tag=tag),
                dist.P2POp(dist.irecv, arriving, group=self._group, group_peer=before, tag=tag),
            ]
        )


class _Following:
    """Gradients that follow their part round."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring
        self._here: Tensor | None = None
        self._arriving: Tensor | None = None
        self._works: list[dist.Work] = []

    def add(self, own: Tensor) -> None:
        """What this rank has for the part that it attends to."""
        here = own if self._here is None else self.arrived().add_(own)
        self._arriving = torch.empty_like(here) if self._here is None else self._here
        self._here = here
        self._works = self._ring.send_on(here, self._arriving, _GRADIENTS)

    def arrived(self) -> Tensor:
        """What the ranks before this one had; at the end, of the own part."""
        assert self._arriving is not None
        _wait(self._works)
        return self._arriving


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


@dataclass(frozen=True)
class _Attention:
    """How a rank attends to parts."""

    sight: ChunkSight
    pair: FlashPair
    scale: float

    def arrivals(self, ring: KeyRing) -> Iterator[Arrival]:
        """In the order in which they come."""
        others = [Chunks(ring.ranks, owner).numbers for owner in ring.owners[1:]]
        return self.sight.arrivals(others, self.pair, self.scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: KeyRing, attention: _Attention
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        sums = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=dtype)
        attending, own_key, own_value, joined = map(_by_head, (query, key, value, sums))
        sight, scale = attention.sight, attention.scale
        whole = before_arrivals(attending, own_key, own_value, joined, biased=sight.biased, scale=scale)
        ctx.rests = []
        arriving = zip(ring.round(_together(key, value)), attention.arrivals(ring), strict=True)
        for memory, arrival in arriving:
            ctx.rests.append(arrival.join(whole, attending, *_heads(memory, key, value)))
        output = sums.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, whole.lse)
        ctx.ring, ctx.attention = ring, attention
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        ring, attention = ctx.ring, ctx.attention
        of_output, attending, own_key, own_value = map(_by_head, (gradient, query, key, value))
        whole = Partial(_by_head(output), lse)
        dq = torch.zeros_like(query, dtype=lse.dtype)

        def gradients_of(memory: Tensor, arrival: Arrival, rests: list[Rest]) -> Tensor:
            """Those of an arrival, which lies in `memory`; adds to dq, too."""
            gradients = torch.zeros_like(memory)
            arrival.add_gradients(
                of_output, attending, *_heads(memory, key, value), whole, rests,
                (_by_head(dq), *_heads(gradients, key, value)),
            )  # fmt: skip
            return gradients

        parts = ring.round(_together(key, value))
        coming = zip(parts, attention.arrivals(ring), ctx.rests, strict=True)
        at_home = gradients_of(*next(coming))
        if attention.sight.biased:
            sums = _by_head(dq), *_heads(at_home, key, value)
            add_gradients_before_arrivals(
                of_output, attending, own_key, own_value, whole, attention.scale, sums
            )
        following = _Following(ring)
        for arrived in coming:
            following.add(gradients_of(*arrived))
        dk, dv = _apart(at_home.add_(following.arrived()), key, value)
        return dq.to(query.dtype), dk, dv, None, None


def _together(key: Tensor, value: Tensor) -> Tensor:
    """In one memory, which is one message."""
    return torch.cat((key.flatten(), value.flatten()))


def _apart(memory: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_together`, shaped as `key` and `value`."""
    of_keys, of_values = memory.split((key.numel(), value.numel()))
    return of_keys.view(key.shape), of_values.view(value.shape)


def _heads(memory: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in `memory`, [b, g, n, channels]."""
    of_keys, of_values = _apart(memory, key, value)
    return _by_head(of_keys), _by_head(of_values)


def _by_head(tensor: Tensor) -> Tensor:
    """[n, b, heads, channels] to [b, heads, n, channels]."""
    return tensor.permute(1, 2, 0, 3)
