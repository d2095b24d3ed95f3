"""Which page holds which slots, of every layer, sequence and KV head; and what taking in tokens takes of the
pool.

The host decides, on its own copies: lengths and pages owned are known exactly there, without asking the
device.

Shapes: l layers, b sequences in question, g KV heads,
c columns of the tables (pages of the longest sequence).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lckv.cache.pool import PagePool

Integers = NDArray[np.int64]

_EVERYTHING = 2**62


class Columns(NamedTuple):
    """Ranges of columns, one for each head [l, b, g]."""

    first: Integers
    stop: Integers

    @property
    def counts(self) -> Integers:
        return np.maximum(self.stop - self.first, 0)


class Growth(NamedTuple):
    """What becomes of some sequences."""

    sequences: Integers
    """[b]."""

    lengths: Integers
    """[l, b, g]: slots afterwards, those that a window has dropped counted too."""

    taken: Columns
    outrun: Columns
    """Given back, because a window has left them behind."""
    cut: Columns
    """Given back, because there are fewer slots than before."""

    @property
    def pages(self) -> int:
        """Pages that it takes from the pool; negative where it gives back more."""
        given_back = self.outrun.counts.sum() + self.cut.counts.sum()
        return int(self.taken.counts.sum() - given_back)


class PageTables:
    """Lengths and pages of `sequences` sequences."""

    def __init__(
        self,
        windows: Sequence[int | None],
        *,
        sequences: int,
        heads: int,
        page_size: int,
        columns: int,
        device: torch.device,
    ) -> None:
        """`windows`: of each layer, the window in tokens beyond which nobody looks;
        None: everything is kept."""
        self.lengths = np.zeros((len(windows), sequences, heads), np.int64)
        """[l, all sequences, g]: slots so far."""
        kept = [_EVERYTHING if window is None else max(1, window - 1) for window in windows]
        self._kept = np.array(kept, np.int64)[:, None, None]
        self._page_size = page_size
        self._host = np.zeros((len(windows), sequences, heads, columns), np.int32)
        self._begin = np.arange(0, self._host.size, columns).reshape(self.lengths.shape)
        self.table = torch.from_numpy(self._host)
        """int32 [l, all sequences, g, c]: numbers of pages, 0 where there is none."""
        if device.type != "cpu":
            self.table = self.table.to(device)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on the device."""
        return self.table.numel() * self.table.element_size()

    def begin(self, sequences: Integers) -> Integers:
        """[l, b, g]: where each head's columns begin in the flattened table."""
        return self._begin[:, sequences]

    def owned(self, sequences: Integers) -> Columns:
        """Columns [l, b, g] that hold pages."""
        return self._columns(self.lengths[:, sequences])

    def growth(self, sequences: Integers, lengths: Integers) -> Growth:
        """What it means that `sequences` have `lengths` [l, b, g], longer or shorter than before. What a
        window has dropped does not come back: see `loses`."""
        old, new = self.owned(sequences), self._columns(lengths)
        taken = Columns(np.maximum(old.stop, new.first), new.stop)
        outrun = Columns(old.first, np.minimum(old.stop, new.first))
        cut = Columns(np.maximum(old.first, new.stop), old.stop)
        return Growth(sequences, lengths, taken, outrun, cut)

    def loses(self, sequences: Integers, lengths: Integers) -> NDArray[np.bool_]:
        """bool [l]: layers of which `sequences` with `lengths` [l, b, g] would have to show what a window has
        dropped."""
        lost = self._columns(lengths).first < self.owned(sequences).first
        return np.asarray(lost.any((1, 2)))

    def apply(self, growth: Growth, pool: PagePool) -> None:
        """Take the pages from the pool, which has enough, and give back what is not needed any more."""
        outrun, cut, taken = (
            self._positions(growth.sequences, columns)
            for columns in (growth.outrun, growth.cut, growth.taken)
        )
        for freed in filter(len, (outrun, cut)):
            pool.give_back(self._host.reshape(-1)[freed])
            self._write(freed, np.zeros(len(freed), np.int32))
        if len(taken):
            self._write(taken, pool.take(len(taken)))
        self.lengths[:, growth.sequences] = growth.lengths

    def release(self, sequence: int, pool: PagePool) -> None:
        """Give all pages of a sequence back."""
        owned = self._host[:, sequence]
        pool.give_back(owned[owned > 0])
        owned[:] = 0
        if self.table.device.type != "cpu":
            self.table[:, sequence] = 0
        self.lengths[:, sequence] = 0

    def _columns(self, lengths: Integers) -> Columns:
        """The pages that hold what `lengths` slots leave to be seen."""
        return Columns(np.maximum(lengths - self._kept, 0) // self._page_size, -(-lengths // self._page_size))

    def _positions(self, sequences: Integers, columns: Columns) -> Integers:
        """[n]: where these columns stand in the flattened table."""
        counts = columns.counts.ravel()
        total = int(counts.sum())
        if total == 0:
            return np.empty(0, np.int64)
        first = (self.begin(sequences) + columns.first).ravel()
        return np.arange(total) + (first - np.cumsum(counts) + counts).repeat(counts)

    def _write(self, positions: Integers, pages: NDArray[np.int32]) -> None:
        self._host.reshape(-1)[positions] = pages
        if self.table.device.type != "cpu":
            index, new = (torch.from_numpy(array).to(self.table.device) for array in (positions, pages))
            self.table.view(-1)[index] = new
