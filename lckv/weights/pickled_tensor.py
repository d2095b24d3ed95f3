"""A tensor in a file of torch.save, of which nothing is read yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lckv.errors import ModelError
from lckv.plain_files import open_plain
from lckv.weights.elements import fill
from lckv.weights.tensors import TensorInfo, row_chunks


@dataclass(frozen=True)
class PickledTensor:
    """A tensor that lies in a file."""

    path: Path
    info: TensorInfo
    strides: tuple[int, ...]
    first_byte: int
    """Of its first number in the file."""

    span: int
    """Numbers from its first to its last, as they lie in the file."""

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows start:stop. Raises ModelError where the file was changed meanwhile."""
        start, stop, _ = (rows or slice(None)).indices(self.info.shape[0] if self.info.shape else 1)
        shape = self.info.shape if rows is None else (max(stop - start, 0), *self.info.shape[1:])
        result = torch.empty(shape, dtype=self.info.dtype)
        try:
            self.copy_rows(start, max(stop, start), result)
        except (OSError, EOFError) as error:
            raise ModelError(f"{self.path} has changed while it was read: {error}.") from error
        return result

    def copy_rows(self, start: int, stop: int, target: Tensor) -> None:
        """Reads rows start:stop into `target`, which has their shape. Raises OSError and EOFError."""
        del stop  # target says it
        self.copy_block((start, *[0] * (target.dim() - 1)) if target.dim() else (), target)

    def copy_block(self, offsets: Sequence[int], target: Tensor) -> None:
        """Reads the block that begins at `offsets` and has the shape of `target` into it, whatever the dtype
        and the device of `target`. Nothing else is read. Raises OSError and EOFError."""
        with open_plain(self.path, buffering=0) as file:
            if self.strides != contiguous_strides(self.info.shape):
                numbers = torch.empty(self.span, dtype=self.info.dtype)
                file.seek(self.first_byte)
                fill(file, numbers)
                whole = numbers.as_strided(self.info.shape, self.strides)
                target.copy_(whole[_place(offsets, target.shape)])
            elif target.is_contiguous() and target.dtype == self.info.dtype and target.device.type == "cpu":
                self._fill(file, offsets, target)
            elif not target.dim():
                target.copy_(self.read())
            else:
                for rows in row_chunks(TensorInfo(tuple(target.shape), self.info.dtype)):
                    part = torch.empty((rows.stop - rows.start, *target.shape[1:]), dtype=self.info.dtype)
                    self._fill(file, (offsets[0] + rows.start, *offsets[1:]), part)
                    target[rows] = part

    def _fill(self, file: BinaryIO, offsets: Sequence[int], target: Tensor) -> None:
        """Reads a block into a contiguous tensor of the file's dtype, in stretches that lie in one piece in
        the file, too: from the last axis on of which only a part is wanted."""
        if not target.numel():
            return
        sizes = target.shape
        parts = [axis for axis, size in enumerate(sizes) if size != self.info.shape[axis]]
        axis = parts[-1] if parts else 0
        stretches = target.reshape(math.prod(sizes[:axis]), -1)
        for stretch, place in zip(stretches, product(*map(range, sizes[:axis])), strict=True):
            first = [offset + step for offset, step in zip_longest(offsets, place, fillvalue=0)]
            number = sum(index * stride for index, stride in zip(first, self.strides, strict=True))
            file.seek(self.first_byte + number * self.info.dtype.itemsize)
            fill(file, stretch)


def _place(offsets: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose rows lie behind one another."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
