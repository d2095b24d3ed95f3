"""A tensor in a file of torch.save, of which nothing is read yet."""

import math
from dataclasses import dataclass
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
        with open_plain(self.path, buffering=0) as file:
            if self._row_by_row:
                self._copy_contiguous(file, start, stop, target)
                return
            numbers = torch.empty(self.span, dtype=self.info.dtype)
            file.seek(self.first_byte)
            fill(file, numbers)
            whole = numbers.as_strided(self.info.shape, self.strides)
            target.copy_(whole if not self.info.shape else whole[start:stop])

    @property
    def _row_by_row(self) -> bool:
        return self.strides == contiguous_strides(self.info.shape)

    def _copy_contiguous(self, file: BinaryIO, start: int, stop: int, target: Tensor) -> None:
        below = self.info.shape[1:]
        file.seek(self.first_byte + start * math.prod(below) * self.info.dtype.itemsize)
        if target.is_contiguous() and target.dtype == self.info.dtype:
            fill(file, target)
            return
        for rows in row_chunks(TensorInfo((stop - start, *below), self.info.dtype)):
            part = torch.empty((rows.stop - rows.start, *below), dtype=self.info.dtype)
            fill(file, part)
            target[rows] = part


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose rows lie behind one another."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
