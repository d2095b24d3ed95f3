"""Memory for slots, in pages that belong to nobody in particular: layers, sequences and KV heads take them
and give them back."""

import numpy as np
import torch
from numpy.typing import NDArray


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
        """Pages that nobody owns: the first so many of the list."""

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.key, self.value))

    def take(self, count: int) -> NDArray[np.int32]:
        """The numbers of `count` pages of zeros, which now have an owner."""
        assert count <= self.free, "checked before anything is changed"
        self.free -= count
        pages = self._free_list[self.free : self.free + count].copy()
        # What a page held before might not be finite, and 0 x inf is no 0 for who reads it under a mask.
        index = torch.from_numpy(pages).to(self.key.device, torch.int64)
        self.key.index_fill_(0, index, 0)
        self.value.index_fill_(0, index, 0)
        return pages

    def give_back(self, pages: NDArray[np.int32]) -> None:
        """These pages have no owner any more."""
        self._free_list[self.free : self.free + len(pages)] = pages
        self.free += len(pages)
