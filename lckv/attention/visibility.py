"""Which keys a query sees: causality with or without the query's own position, a sliding window, document
boundaries.

Shapes: b batch rows, s tokens of a row, n documents in the batch.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class Remembering:
    """What keeps what is made of it."""

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once under this `name`."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}


@dataclass(frozen=True, eq=False)
class Documents(Remembering):
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
        return cls(to_device(on_host, device), tuple(bounds))

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

    def around(self, row_length: int, row: int, token: int) -> tuple[int, int]:
        """Start and stop, in rows of `row_length` tokens, of the document of `token` of `row`."""
        place = bisect_right(self.bounds, row * row_length + token)
        return self.bounds[place - 1] - row * row_length, self.bounds[place] - row * row_length

    def cut(self, row_length: int, *ranges: tuple[int, int]) -> "Documents":
        """The documents of the tokens start .. stop - 1 of each of `ranges` of each row of `row_length`
        tokens, one range after the other, as rows of their own, with bounds that the host knows. The same cut
        is made once."""
        if ranges == ((0, row_length),):
            return self
        return self.once(("cut", row_length, ranges), lambda: self._cut(row_length, ranges))

    def _cut(self, row_length: int, ranges: Sequence[tuple[int, int]]) -> "Documents":
        bounds = np.asarray(self.bounds)
        document = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)).reshape(-1, row_length)
        kept = np.concatenate([document[:, start:stop] for start, stop in ranges], 1).reshape(-1)
        starts = np.flatnonzero(np.diff(kept, prepend=-1))
        return Documents.at([*starts.tolist(), len(kept)], self.cu_seqlens.device)


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


def to_device(on_host: Tensor, device: torch.device | str) -> Tensor:
    """`on_host` on `device`, which is not waited for."""
    if torch.device(device).type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)
