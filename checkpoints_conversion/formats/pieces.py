"""A tensor that is stored in pieces, such as those of tensor-parallel ranks, read as a whole row by row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lckv.weights.tensors import TensorInfo


@dataclass(frozen=True)
class Piece:
    """A block of a whole tensor."""

    offsets: tuple[int, ...]
    """Where it begins in the whole."""

    sizes: tuple[int, ...]
    """Its shape."""

    copy_rows: Callable[[int, int, Tensor], None]
    """Copies the piece's own rows start:stop into a tensor of their shape."""


def cover(pieces: Sequence[Piece], shape: tuple[int, ...]) -> bool:
    """Whether pieces that do not overlap make up a tensor of this shape."""
    inside = all(
        offset >= 0 and offset + size <= length
        for piece in pieces
        for offset, size, length in zip(piece.offsets, piece.sizes, shape, strict=True)
    )
    return inside and sum(math.prod(piece.sizes) for piece in pieces) == math.prod(shape)


def join_rows(pieces: Sequence[Piece], info: TensorInfo, rows: slice | None) -> Tensor:
    """Rows of the tensor `info` that the pieces make up; what they have below its last row is left out."""
    start, stop, _ = (rows or slice(None)).indices(info.shape[0])
    whole = torch.empty((max(stop - start, 0), *info.shape[1:]), dtype=info.dtype)
    for piece in pieces:
        first = piece.offsets[0]
        low, high = max(start, first), min(stop, first + piece.sizes[0])
        if low < high:
            beside = (
                slice(at, at + size) for at, size in zip(piece.offsets[1:], piece.sizes[1:], strict=True)
            )
            piece.copy_rows(low - first, high - first, whole[(slice(low - start, high - start), *beside)])
    return whole
