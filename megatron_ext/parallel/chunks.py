"""Context parallelism: which tokens of a row a rank has.

A row of s tokens is cut into 2 N equal chunks for N ranks; rank r has chunks r and 2 N - 1 - r, one after the
other, so that all ranks have equally much causal attention to compute:

    N = 2    chunk  0       1       2       3
             rank   0       1       1       0

Shapes: s tokens of a row, b rows, c tokens of a chunk, n chunks of a rank (2, or 1 without context
parallelism).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lckv.policies.config import Reach


@dataclass(frozen=True)
class Chunks:
    """The part of each row that one of `ranks` ranks has."""

    ranks: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Chunks of a row."""
        return 1 if self.ranks == 1 else 2 * self.ranks

    @property
    def numbers(self) -> tuple[int, ...]:
        """The rank's chunks, from 0, in the order in which it has them."""
        return (0,) if self.ranks == 1 else (self.rank, 2 * self.ranks - 1 - self.rank)

    @property
    def order(self) -> tuple[int, ...]:
        """Where each chunk of a row, from the first, stands when those of all ranks follow each other."""
        of_ranks = [number for rank in range(self.ranks) for number in Chunks(self.ranks, rank).numbers]
        return tuple(of_ranks.index(number) for number in range(self.total))

    def bounds(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each of the rank's chunks in a row of `tokens` tokens."""
        size = tokens // self.total
        return tuple((number * size, (number + 1) * size) for number in self.numbers)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """The rank's part of whole rows, whose tokens are dimension `dim`."""
        if self.ranks == 1:
            return whole
        size = whole.shape[dim] // self.total
        return torch.cat([whole.narrow(dim, number * size, size) for number in self.numbers], dim)

    def rows(self, whole: Tensor, reach: Reach, outside: float = 0) -> Tensor:
        """The rank's chunks as rows, with the tokens around them: whole rows [s, b, ...] to
        [before + c + after, n b, ...]. `outside` stands where the row has no token."""
        padded = torch.cat(
            (
                whole.new_full((reach.before, *whole.shape[1:]), outside),
                whole,
                whole.new_full((reach.after, *whole.shape[1:]), outside),
            )
        )
        around = reach.before + reach.after
        return torch.cat([padded[start : stop + around] for start, stop in self.bounds(len(whole))], 1)


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """What a KV policy knows of the rank's chunks, which are rows to it: [before + c + after, n b] with the
    tokens around them."""

    reach: Reach
    position_ids: Tensor
    """int64."""

    begins: Tensor
    """bool: see `RowPart`."""

    counted: Tensor | None
    """bool: tokens that are not padding; None: all."""

    counted_in_row: Tensor
    """float32 [n b]: tokens of the whole row that are not padding, at least 1."""


def chunk_rows(
    chunks: Chunks, reach: Reach, position_ids: Tensor, begins: Tensor, counted: Tensor | None
) -> ChunkRows:
    """From whole rows [b, s]: positions, where documents begin, and what is not padding (None: all)."""
    tokens = torch.full((len(begins),), float(begins.shape[1]), device=begins.device)
    if counted is not None:
        tokens = counted.sum(1).clamp(min=1).float()
        after_padding = torch.cat((torch.zeros_like(begins[:, :1]), ~counted[:, :-1]), 1)
        begins = begins | after_padding
    return ChunkRows(
        reach,
        chunks.rows(position_ids.transpose(0, 1), reach),
        chunks.rows(begins.transpose(0, 1), reach, outside=True),
        None if counted is None else chunks.rows(counted.transpose(0, 1), reach, outside=True),
        tokens.repeat(len(chunks.numbers)),
    )
