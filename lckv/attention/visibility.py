"""Which keys a query sees: causality with or without the query's own position, a sliding window, document
boundaries.

Shapes: b batch rows, s tokens of a row, n documents in the batch.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents packed into the rows of a batch. A query sees no key of another document."""

    cu_seqlens: Tensor
    """int32 [n + 1]: where each document starts in the b * s tokens, rows one after the other, and b * s at
    the end (the convention of flash-attn's varlen interface). Every row starts a document."""

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """cu_seqlens on the host."""
        return tuple(self.cu_seqlens.tolist())

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False))

    def spans(self, row_length: int) -> tuple[tuple[int, int, int], ...]:
        """(row, start, stop) of every document in rows of `row_length` tokens;
        ValueError where one crosses a row's end."""
        spans = []
        for start, stop in zip(self.bounds, self.bounds[1:], strict=False):
            row, first = divmod(start, row_length)
            if first + stop - start > row_length:
                raise ValueError(
                    f"cu_seqlens: the document at tokens {start} to {stop - 1} crosses the end of a row of "
                    f"{row_length} tokens; every row must start a document."
                )
            spans.append((row, first, first + stop - start))
        return tuple(spans)

    @cached_property
    def without_first_tokens(self) -> tuple[Tensor, Tensor]:
        """Indices int64 of all tokens but the first of each document, and the cu_seqlens int32 [n + 1] of
        what is left."""
        starts = self.cu_seqlens[:-1].long()
        kept = torch.ones(self.bounds[-1], dtype=torch.bool, device=starts.device)
        kept[starts] = False
        shrunk = self.cu_seqlens - torch.arange(len(self.bounds), dtype=torch.int32, device=starts.device)
        return kept.nonzero().squeeze(1), shrunk


@dataclass(frozen=True, eq=False)
class Visibility:
    """What a layer's queries see: query t sees keys t - window + 1 ..
    t of its document, t itself unless excluded."""

    exclude_self: bool = False
    """Query t does not see key t: the keys of a cyclic layer do not exist yet at t."""

    window: int | None = None
    """W: tokens seen, the query's own place included (so W - 1 keys where it is excluded). None: all."""

    documents: Documents | None = None
    """Document boundaries; None: every row is one document."""
