"""Which keys a query sees: causality with or without the query's own position, a sliding window, document
boundaries.

Shapes: b batch rows, s tokens of a row, n documents in the batch.
"""

from collections.abc import Sequence
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

    known_bounds: tuple[int, ...] | None = None
    """cu_seqlens, where the host knows them: then no device is waited for."""

    @classmethod
    def at(cls, bounds: Sequence[int], device: torch.device | str) -> "Documents":
        """Documents whose bounds the host knows."""
        on_host = torch.tensor(bounds, dtype=torch.int32)
        return cls(_move(on_host, device), tuple(bounds))

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """cu_seqlens on the host."""
        return tuple(self.cu_seqlens.tolist()) if self.known_bounds is None else self.known_bounds

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

    def cut(self, row_length: int, start: int, stop: int) -> "Documents":
        """The documents of tokens start .. stop - 1 of each row of `row_length` tokens, as rows of their own,
        with bounds that the host knows. The same cut is made once."""
        if (start, stop) == (0, row_length):
            return self
        place = row_length, start, stop
        if place not in self._cuts:
            length = stop - start
            bounds = [
                row * length + max(first - start, 0)
                for row, first, last in self.spans(row_length)
                if last > start and first < stop
            ]
            rows = self.bounds[-1] // row_length
            self._cuts[place] = Documents.at([*bounds, rows * length], self.cu_seqlens.device)
        return self._cuts[place]

    @cached_property
    def _cuts(self) -> dict[tuple[int, int, int], "Documents"]:
        """By row length, start and stop."""
        return {}

    @cached_property
    def without_first_tokens(self) -> tuple[Tensor, Tensor]:
        """Indices int64 of all tokens but the first of each document, and the cu_seqlens int32 [n + 1] of
        what is left."""
        bounds = torch.tensor(self.bounds)
        kept = torch.ones(self.bounds[-1], dtype=torch.bool)
        kept[bounds[:-1]] = False
        shrunk = (bounds - torch.arange(len(bounds))).to(torch.int32)
        device = self.cu_seqlens.device
        return _move(kept.nonzero().squeeze(1), device), _move(shrunk, device)


@dataclass(frozen=True, eq=False)
class Visibility:
    """What a layer's queries see: query t sees keys t - window + 1 ..
    t of its document, t itself unless excluded. Where keys are longer than queries, the queries are those of
    the last tokens."""

    exclude_self: bool = False
    """Query t does not see key t: the keys of a cyclic layer do not exist yet at t."""

    window: int | None = None
    """W: tokens seen, the query's own place included (so W - 1 keys where it is excluded). None: all."""

    documents: Documents | None = None
    """Document boundaries in rows of as many tokens as there are keys; None: every row is one document."""

    def cuts(self, length: int) -> bool:
        """Whether the window hides keys in rows of so many tokens."""
        return self.window is not None and self.window < length


def _move(on_host: Tensor, device: torch.device | str) -> Tensor:
    """To `device`, without waiting for it."""
    if torch.device(device).type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)
