"""Named weights that are read one at a time."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lckv.errors import ModelError

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Kinds of numbers that a model's weights may have."""
CHUNK_BYTES = 8 * 2**20
"""How much of a tensor is copied at a time."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """A model's tensors, of which nothing is in memory until it is read."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name, in the order in which they are best read and written."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor on the CPU: whole, or the rows start:stop of its first axis.

        Takes no more memory than the result and a small constant. Raises KeyError for a name not in `infos()`
        and ModelError where its file turns out to be damaged.
        """


@dataclass(frozen=True)
class MemorySource:
    """Tensors that are in memory."""

    tensors: Mapping[str, Tensor]

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name, in the order given."""
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or a view of its rows."""
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def row_chunks(info: TensorInfo, chunk_bytes: int = CHUNK_BYTES) -> Iterator[slice]:
    """The tensor's rows from the first to the last, in slices of about `chunk_bytes` (at least one row)."""
    rows = info.shape[0]
    step = max(1, chunk_bytes * rows // max(info.nbytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def dtype_name(dtype: torch.dtype) -> str:
    """What files call the dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: object, where: str) -> torch.dtype:
    """The dtype of weights that files call `name`, such as "bfloat16".

    Raises ModelError with the field `where` for one that weights do not have.
    """
    known = {dtype_name(dtype): dtype for dtype in WEIGHT_DTYPES}
    dtype = known.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ModelError(f"{where} is {name!r}; weights of {', '.join(known)} can be read.")
    return dtype
