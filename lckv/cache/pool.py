"""Memory for slots, in pages that belong to nobody in particular: layers, sequences and KV heads take them
and give them back.

Sequences and snapshots may hold the same page. It is free when the last of them has given it back. Whoever
writes to a page holds it alone; `PageTables.growth` sees to that."""

import numpy as np
import torch
from numpy.typing import NDArray

Pages = NDArray[np.int32]


class OutOfPagesError(RuntimeError):
    """What shall be taken in needs more pages than are free. Nothing was changed."""


class PagePool:
    """Keys and values of `pages` pages, and a free list of their numbers, which begin at 1: page 0 is zeros,
    belongs to nobody and stands where there is no page."""

    def __init__(
        self, pages: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pages = pages
        self.key, self.value = (
            torch.zeros(pages + 1, page_size, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self._free_list = np.arange(pages, 0, -1, dtype=np.int32)
        self.free = pages
        """Pages that nobody holds: the first so many of the list."""
        self.in_use = 0
        """Pages that sequences hold; the others that are not free are held by snapshots alone."""
        # How many hold each page: [0] sequences, [1] snapshots.
        self._holders = np.zeros((2, pages + 1), np.int32)
        self._place = np.zeros(pages + 1, np.int64)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.key, self.value))

    def take(self, count: int) -> Pages:
        """The numbers of `count` pages of zeros, each of which one sequence now holds."""
        assert count <= self.free, "checked before anything is changed"
        self.free -= count
        self.in_use += count
        pages = self._free_list[self.free : self.free + count].copy()
        self._holders[0, pages] = 1
        # What a page held before might not be finite, and 0 x inf is no 0 for who reads it under a mask.
        index = torch.from_numpy(pages).to(self.key.device, torch.int64)
        self.key.index_fill_(0, index, 0)
        self.value.index_fill_(0, index, 0)
        return pages

    def copy(self, pages: Pages) -> Pages:
        """The numbers of copies of `pages`, each of which one sequence now holds."""
        copies = self.take(len(pages))
        source, target = (
            torch.from_numpy(numbers).to(self.key.device, torch.int64) for numbers in (pages, copies)
        )
        for memory in (self.key, self.value):
            memory.index_copy_(0, target, memory.index_select(0, source))
        return copies

    def share(self, pages: Pages, *, snapshot: bool = False) -> None:
        """A sequence, or a snapshot, holds these pages too, each once."""
        if not snapshot:
            self.in_use += int((self._holders[0, pages] == 0).sum())
        self._holders[int(snapshot), pages] += 1

    def shared(self, pages: Pages) -> NDArray[np.bool_]:
        """Which of these pages more than one sequence or snapshot holds."""
        return np.asarray(self._holders[:, pages].sum(0) > 1)

    def give_back(self, pages: Pages, *, snapshot: bool = False) -> None:
        """Sequences, or a snapshot, hold these pages no more.
        A page stands there once for each sequence that gives it back."""
        holders = self._holders[int(snapshot)]
        np.subtract.at(holders, pages, 1)
        left = self._once(pages[holders[pages] == 0])
        if not snapshot:
            self.in_use -= len(left)
        freed = left[self._holders[1 - int(snapshot), left] == 0]
        self._free_list[self.free : self.free + len(freed)] = freed
        self.free += len(freed)

    def _once(self, pages: Pages) -> Pages:
        """The same, each page once."""
        places = np.arange(len(pages))
        self._place[pages] = places
        return pages[self._place[pages] == places]
