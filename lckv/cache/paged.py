"""A cache for sequences that come and go, and heads of very different lengths: pages from one pool, returned
when a sequence ends.

Every KV head of every sequence and layer holds as many pages as its slots fill. All memory is allocated at
construction: keys and values in pages, tables of who holds which, lengths,
and what the KV policy keeps of each sequence.

What a sequence holds can be kept as a snapshot, from which others begin (`snapshots.py`). The page numbers,
lengths and the policy's state of a snapshot are allocated with it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lckv.cache.paged_memory import PagedMemory
from lckv.cache.paged_rows import PagedRows
from lckv.cache.paged_step import PagedStep
from lckv.cache.pool import OutOfPagesError, PagePool
from lckv.cache.snapshots import Snapshot, drop_snapshot, fill_from, take_snapshot
from lckv.policies.base import KVPolicy

__all__ = ["OutOfPagesError", "PagedCache", "Snapshot"]


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
        """Pages that nobody holds."""
        return self._pool.free

    @property
    def pages_in_use(self) -> int:
        """Pages that open sequences hold."""
        return self._pool.in_use

    @property
    def pages_kept(self) -> int:
        """Pages that snapshots hold, and no open sequence: what dropping all snapshots would set free."""
        return self._pool.pages - self._pool.free - self._pool.in_use

    @property
    def snapshots_shorten(self) -> bool:
        """Whether every snapshot serves for any number of its first tokens."""
        return self._memory.keeps_every_token and not self._memory.windowed

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

    def open(self, snapshot: Snapshot | None = None, tokens: int | None = None) -> int:
        """The number of a new sequence: an empty one, or one that begins with what `snapshot` holds, or with
        the first `tokens` of it. Raises ValueError if there are `max_sequences`, and where the snapshot does
        not serve for so many tokens. No page is taken before tokens come."""
        if not self._closed:
            raise ValueError(f"max_sequences is {self.max_sequences}, and so many are open; close one first.")
        sequence = self._closed[-1]
        if snapshot is not None:
            fill_from(self._memory, sequence, snapshot, snapshot.tokens if tokens is None else tokens)
        self._open.add(sequence)
        return self._closed.pop()

    def keep(self, sequence: int) -> Snapshot:
        """What a sequence holds now, for `open`. Its pages are not free before `drop`, even when the sequence
        is closed. No page is taken. Raises ValueError if the sequence is not open."""
        self._check_open([sequence])
        return take_snapshot(self._memory, sequence)

    def drop(self, snapshot: Snapshot) -> None:
        """Forget a snapshot, once; sequences that began from it go on."""
        drop_snapshot(self._memory, snapshot)

    def close(self, sequence: int) -> None:
        """Forget a sequence; the pages that it alone holds are free. Raises ValueError if it is not open."""
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

    def step(self, rows: int, *, fixed: bool = False) -> PagedStep:
        """Steps in which each of up to `rows` sequences gets one more token; see `PagedStep`."""
        return PagedStep(self._memory, rows, fixed=fixed)

    def pages_needed(self, sequences: Sequence[int], new_tokens: int | Sequence[int]) -> int:
        """By how many `pages_free` shrinks when each of `sequences` takes in so many tokens; at most, since a
        policy may merge them. Copies of pages that they share are counted.
        Negative where windows give more back."""
        tables, index = self._memory.tables, np.array(sequences, np.int64)
        added = np.broadcast_to(np.array(new_tokens, np.int64), index.shape)
        return tables.growth(index, tables.lengths[:, index] + added[:, None]).pages

    def pages_to_begin(
        self, new_tokens: int, snapshot: Snapshot | None = None, tokens: int | None = None
    ) -> int:
        """By how much `pages_free` shrinks, at most, when a sequence that `open` would make of the other
        arguments takes in `new_tokens`."""
        if snapshot is None:
            held = np.zeros_like(self._memory.tables.lengths[:, :1])
        else:
            held = snapshot.lengths_of(snapshot.tokens if tokens is None else tokens)
        return self._memory.tables.pages_to_begin(new_tokens, held)

    def _check_open(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            if sequence not in self._open:
                raise ValueError(f"sequence {sequence} is not open.")
