"""A cache for sequences that come and go, and heads of very different lengths: pages from one pool, returned
when a sequence ends.

Every KV head of every sequence and layer owns as many pages as its slots fill. All memory is allocated at
construction: keys and values in pages, tables of who owns which, lengths,
and what the KV policy keeps of each sequence.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lckv.cache.paged_memory import PagedMemory
from lckv.cache.paged_rows import PagedRows
from lckv.cache.pool import OutOfPagesError, PagePool
from lckv.policies.base import KVPolicy

__all__ = ["OutOfPagesError", "PagedCache"]


class PagedCache:
    """Sequences, by number. `rows` is what a model runs on."""

    def __init__(
        self,
        *,
        layers: Iterable[int],
        policy: KVPolicy,
        windows: Mapping[int, int],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pages: int,
        page_size: int = 16,
        max_sequences: int,
        max_tokens: int,
    ) -> None:
        """`layers` compute keys and values. `windows` holds those of them that only windowed layers read,
        with the window in tokens: pages of older tokens are given back. `pages` of `page_size` slots of one
        KV head; `max_tokens` of the longest sequence. If the policy keeps a state, zeros must stand for no
        tokens.

        Raises ValueError for sizes below 1.
        """
        sizes = {
            "pages": pages,
            "page_size": page_size,
            "max_sequences": max_sequences,
            "max_tokens": max_tokens,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        self.page_size, self.max_sequences, self.max_tokens = page_size, max_sequences, max_tokens
        self._pool = PagePool(pages, page_size, head_dim, dtype, torch.device(device))
        self._memory = PagedMemory(
            layers,
            policy,
            windows,
            self._pool,
            kv_heads=kv_heads,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
        )
        self._closed = list(range(max_sequences - 1, -1, -1))
        self._open: set[int] = set()

    @property
    def pages(self) -> int:
        """Pages of one KV head that there are."""
        return self._pool.pages

    @property
    def pages_free(self) -> int:
        """Pages that nobody owns."""
        return self._pool.free

    @property
    def pages_in_use(self) -> int:
        """Pages that somebody owns."""
        return self._pool.pages - self._pool.free

    @property
    def bytes_per_page(self) -> int:
        """Keys and values."""
        return self._pool.num_bytes // (self._pool.pages + 1)

    @property
    def bytes_per_sequence(self) -> int:
        """What there is for every sequence beside its pages, open or not:
        tables, lengths, the policy's state."""
        return (self.num_bytes - self._pool.num_bytes) // self.max_sequences

    @property
    def num_bytes(self) -> int:
        """Bytes allocated: (pages + 1) * bytes_per_page + max_sequences * bytes_per_sequence."""
        return self._memory.num_bytes

    @property
    def compression_ratio(self) -> float:
        """Tokens per slot over all open sequences, layers and KV heads, with those that a window has dropped;
        1 while there are none."""
        lengths = self._memory.tables.lengths
        slots = int(lengths.sum())
        return int(self._memory.tokens.sum()) * lengths[:, 0].size / slots if slots else 1.0

    def lengths(self, sequence: int, layer: int) -> Tensor:
        """int64 [g], on the CPU: slots so far of a layer that computes keys and values, with those that a
        window has dropped."""
        return torch.from_numpy(self._memory.tables.lengths[self._memory.number[layer], sequence].copy())

    def open(self) -> int:
        """The number of a new, empty sequence. Raises ValueError if there are `max_sequences`."""
        if not self._closed:
            raise ValueError(f"max_sequences is {self.max_sequences}, and so many are open; close one first.")
        self._open.add(self._closed[-1])
        return self._closed.pop()

    def close(self, sequence: int) -> None:
        """Forget a sequence; its pages are free. Raises ValueError if it is not open."""
        self._check_open([sequence])
        self._memory.forget(sequence)
        self._open.remove(sequence)
        self._closed.append(sequence)

    def rows(self, sequences: Sequence[int]) -> PagedRows:
        """A cache whose row i is `sequences[i]`. Raises ValueError
        where one is not open, or twice among them."""
        self._check_open(sequences)
        if len(set(sequences)) < max(1, len(sequences)):
            raise ValueError(f"sequences is {list(sequences)}; give at least one, and each only once.")
        return PagedRows(self._memory, np.array(sequences, np.int64))

    def pages_needed(self, sequences: Sequence[int], new_tokens: int | Sequence[int]) -> int:
        """By how many `pages_free` shrinks when each of `sequences` takes in so many tokens; at most, since a
        policy may merge them. Negative where windows give more back."""
        tables, index = self._memory.tables, np.array(sequences, np.int64)
        added = np.broadcast_to(np.array(new_tokens, np.int64), index.shape)
        return tables.growth(index, tables.lengths[:, index] + added[:, None]).pages

    def _check_open(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            if sequence not in self._open:
                raise ValueError(f"sequence {sequence} is not open.")
