"""Context parallelism: what the ranks that share rows send each other.

Keys and values of layers that compute them, once per pass; the tokens around chunks for KV policies that look
there; the sums that such policies carry along a row; and the sums of their statistics. All of it can be
differentiated, and every rank runs the same of it in the same order, forward and backward.

Shapes: as in `megatron_ext.parallel.chunks`; g heads, d channels.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.policies.base import KeyValue
from lckv.policies.config import Reach
from megatron_ext.parallel.chunks import Chunks


class ContextGroup:
    """The ranks that share rows, seen from one of them."""

    def __init__(self, group: dist.ProcessGroup, *, ring: bool = False) -> None:
        """`ring`: keys and values go round (`megatron_ext.parallel.key_ring`)."""
        self._group, self._ring = group, ring

    @cached_property
    def chunks(self) -> Chunks:
        """What this rank has of each row."""
        return Chunks(self._group.size(), self._group.rank())

    @property
    def is_alone(self) -> bool:
        """Whether this rank has whole rows."""
        return self.chunks.ranks == 1

    def whole(self, own: Tensor) -> Tensor:
        """Whole rows [s, ...], from the rank's part [n c, ...]."""
        if self.is_alone:
            return own
        return self._by_chunk(own.unflatten(0, (len(self.chunks.numbers), -1))).flatten(0, 1)

    def gather(self, own: KeyValue) -> KeyValue:
        """Keys and values of whole rows [s, b, g, ...], from the rank's part [n c, b, g, ...]."""
        if self.is_alone:
            return own
        return KeyValue(*_Gather.apply(*own, self._group, self.chunks.order))

    def kept(self, own: KeyValue) -> KeyValue:
        """What layers attend to: keys and values of whole rows, or, where those go round, the rank's part."""
        return own if self._ring else self.gather(own)

    def own(self, whole: KeyValue) -> KeyValue:
        """The rank's part of keys and values of whole rows."""
        return KeyValue(*(self.chunks.own(tensor, 0) for tensor in whole))

    def rows(self, tensors: Sequence[Tensor], reach: Reach) -> list[Tensor]:
        """The rank's chunks as rows, with the tokens around them, of tensors [n c, b, any heads, any
        channels]: each becomes [before + c + after, n b, its heads, its channels]. Where the row has no token
        there are zeros."""
        number, shapes = len(self.chunks.numbers), [tensor.shape[2:] for tensor in tensors]
        # [n c, b, heads, d] to [n, c, b, heads, d] to [c, n b, heads, d]
        inner = [tensor.unflatten(0, (number, -1)).transpose(0, 1).flatten(1, 2) for tensor in tensors]
        if reach == Reach():
            return inner
        if max(reach.before, reach.after) > len(inner[0]):  # further than the neighbours
            return _split(self.chunks.rows(self.whole(_joined(tensors)), reach), shapes)
        ends = [torch.cat((rows[: reach.after], rows[len(rows) - reach.before :])) for rows in inner]
        before, after = self._around(_joined(ends), reach)
        around = zip(_split(before, shapes), inner, _split(after, shapes), strict=True)
        return [torch.cat(parts) for parts in around]

    def _around(self, ends: Tensor, reach: Reach) -> tuple[Tensor, Tensor]:
        """What is in front of each of the rank's chunks and behind it, [before, n b, ...] and
        [after, n b, ...], from their own first and last tokens [after + before, n b, ...]."""
        own = ends.unflatten(1, (len(self.chunks.numbers), -1)).transpose(0, 1)  # [n, after + before, b, ...]
        gathered, nothing = self._by_chunk(own), torch.zeros_like(own[:1])
        numbers = list(self.chunks.numbers)
        behind = torch.cat((gathered[1:], nothing))[numbers, : reach.after]
        in_front = torch.cat((nothing, gathered[:-1]))[numbers, reach.after :]
        before, after = (part.transpose(0, 1).flatten(1, 2) for part in (in_front, behind))
        return before, after

    def parts(self, rows: Tensor, reach: Reach) -> Tensor:
        """The inverse of `rows`: the rank's part [n c, b, ...] of [before + c + after, n b, ...]."""
        # [c, n b, ...] to [c, n, b, ...] to [n c, b, ...]
        return reach.own(rows).unflatten(1, (len(self.chunks.numbers), -1)).transpose(0, 1).flatten(0, 1)

    def carried(self, product: Tensor, last: Tensor) -> Tensor:
        """See `RowPart.carried`; chunks are rows, [n b, g] and [n b, g, m]."""
        ends = torch.cat((last, product[..., None]), -1).unflatten(0, (len(self.chunks.numbers), -1))
        into, sums = [], torch.zeros_like(ends[0, ..., :-1])
        for end in self._by_chunk(ends):
            into.append(sums)
            sums = end[..., :-1] + end[..., -1:] * sums
        return torch.cat([into[number] for number in self.chunks.numbers])

    def _by_chunk(self, own: Tensor) -> Tensor:
        """Of each of the rank's chunks [n, ...] to each chunk of the row, from the first, [2 N, ...]."""
        gathered = gather_from_sequence_parallel_region(own.contiguous(), group=self._group)
        return gathered[list(self.chunks.order)]

    def sum(self, own: Tensor) -> Tensor:
        """The sum over the ranks, which each rank uses as it likes."""
        return own if self.is_alone else _Sum.apply(own, self._group)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [s, b, ...] as one, [s, b, all their numbers], to be sent at once."""
    return torch.cat([tensor.flatten(2) for tensor in tensors], 2)


def _split(joined: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The inverse of `_joined`, of tensors [s, b, *shape]."""
    parts = joined.split([shape.numel() for shape in shapes], 2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


class _Gather(torch.autograd.Function):
    """Keys and values of all ranks, chunk after chunk, in one collective;
    gradients are summed where the numbers come from."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, group: dist.ProcessGroup, order: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.order, ctx.width = group, order, key.shape[-1]
        own = torch.cat((key, value), -1)
        gathered = own.new_empty(group.size() * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own, group=group)
        chunks = gathered.chunk(len(order))
        return (
            torch.cat([chunks[place][..., : ctx.width] for place in order]),
            torch.cat([chunks[place][..., ctx.width :] for place in order]),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        number = len(ctx.order)
        key, value = (gradient.chunk(number) for gradient in gradients)
        chunks = [ctx.order.index(place) for place in range(number)]
        of_ranks = torch.cat([torch.cat((key[chunk], value[chunk]), -1) for chunk in chunks])
        own = of_ranks.new_empty(len(of_ranks) // ctx.group.size(), *of_ranks.shape[1:])
        dist.reduce_scatter_tensor(own, of_ranks, group=ctx.group)
        return own[..., : ctx.width], own[..., ctx.width :], None, None


class _Sum(torch.autograd.Function):
    """A sum over ranks whose gradient is summed, too: each rank weighs it by its own tokens."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
