"""What one layer keeps for backward on the host, and how it looks on the device again."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.offload.host_pool import Block, HostPool
from megatron_ext.offload.tokens import Split
from megatron_ext.offload.transfer import Link

_ALIGNMENT = 512
"""Bytes between the beginnings of tensors in a buffer."""


class View(NamedTuple):
    """A part of a held tensor's memory, seen as a tensor."""

    number: int
    """Of the held tensor in its layer."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements from the beginning of the held tensor."""

    def of(self, held: Tensor) -> Tensor:
        """`held`: the held tensor, on the device."""
        return held.as_strided(self.shape, self.stride, held.storage_offset() + self.offset)


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that is on the host as a whole, or whose first tokens are."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    split: Split | None
    """Which rows are on the host; None: all."""

    block: Block | None
    """None: none of them."""

    offset: int
    """Bytes from the beginning of the buffer on the device."""

    @classmethod
    def keep(cls, tensor: Tensor, split: Split | None, offset: int, pool: HostPool, link: Link) -> "Held":
        """Copies to the host what belongs there. Strides are those of `tensor`, or contiguous ones where that
        leaves gaps in its memory."""
        stride = tensor.stride() if is_dense(tensor) else _contiguous(tensor.shape)
        held = cls(tensor.shape, stride, tensor.dtype, split, None, offset)
        part = held._part(tensor)
        if part.numel() == 0:
            return held
        block = pool.take(part.numel() * part.element_size())
        held = cls(tensor.shape, stride, tensor.dtype, split, block, offset)
        link.copy(held._on_host(part), part)
        return held

    @property
    def end(self) -> int:
        """Where the next tensor may begin in the buffer."""
        size = self.shape.numel() * self.dtype.itemsize
        return self.offset + -(-size // _ALIGNMENT) * _ALIGNMENT

    def load(self, buffer: Tensor, link: Link) -> None:
        """Copies what is on the host into `buffer`, uint8."""
        if self.block is not None:
            part = self._part(self.on_device(buffer))
            link.copy(part, self._on_host(part))

    def complete(self, buffer: Tensor, tail: Tensor) -> None:
        """Writes the tokens that were computed again, [shards * (rows - head), ...], into `buffer`. A tensor
        that has no tokens, but by chance their number of rows, comes as a whole."""
        assert self.split is not None
        whole = self.on_device(buffer)
        target = whole if tail.shape == whole.shape else self.split.tail_of(whole)
        target.copy_(tail.view_as(target))

    def on_device(self, buffer: Tensor) -> Tensor:
        """The tensor in `buffer`, uint8."""
        size = self.shape.numel() * self.dtype.itemsize
        flat = buffer[self.offset : self.offset + size].view(self.dtype)
        return flat.as_strided(self.shape, self.stride, flat.storage_offset())

    def _part(self, tensor: Tensor) -> Tensor:
        """What of the whole tensor is on the host."""
        return tensor if self.split is None else self.split.head_of(tensor)

    def _on_host(self, part: Tensor) -> Tensor:
        """Its place there, laid out as `part` so that a copy of dense memory stays one piece."""
        assert self.block is not None
        size = part.numel() * part.element_size()
        stride = part.stride() if is_dense(part) else _contiguous(part.shape)
        return self.block.memory[:size].view(self.dtype).as_strided(part.shape, stride)


def view_of(tensor: Tensor, known: Tensor, number: int) -> View | None:
    """How `tensor` is seen in the memory of `known`, held as `number`; None if it is not inside of it."""
    if memory_of(tensor) != memory_of(known):
        return None
    if tensor.dtype != known.dtype:
        return None
    offset = int(tensor.storage_offset()) - int(known.storage_offset())
    if not is_dense(known):
        same = offset == 0 and tensor.shape == known.shape and tensor.stride() == known.stride()
        return View(number, known.shape, _contiguous(known.shape), 0) if same else None
    if offset < 0 or offset + _extent(tensor) > known.numel():
        return None
    return View(number, tensor.shape, tensor.stride(), offset)


def memory_of(tensor: Tensor) -> int:
    """Which memory a living tensor is in; tensors without numbers, which have no addresses, know it too."""
    return tensor.untyped_storage()._cdata


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each its own place."""
    return tensor.numel() == _extent(tensor) and _no_overlap(tensor)


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _no_overlap(tensor: Tensor) -> bool:
    return all(step > 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(1, size)
    return tuple(reversed(steps))
