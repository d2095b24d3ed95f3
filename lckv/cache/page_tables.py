"""Which page holds which slots, of every layer, sequence and KV head; and what taking in tokens takes of the
pool.

The host decides, on its own copies: lengths and pages owned are known exactly there, without asking the
device.

A sequence may hold pages together with others: those of the snapshot that it began from, and those that a
snapshot was taken of. Before it writes to such a page it gets a copy of its own:

    page size 4       slots   0 1 2 3  4 5 6 7  8 9
    snapshot          pages   [  1  ]  [  2  ]  [3  ]
    a sequence of it  pages   [  1  ]  [  2  ]  [3  ]
    one token more    pages   [  1  ]  [  2  ]  [4    ]      4: a copy of 3, and the new slot

Shapes: l layers, b sequences in question, g KV heads,
c columns of the tables (pages of the longest sequence).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lckv.cache.pool import PagePool, Pages

Integers = NDArray[np.int64]

_EVERYTHING = 2**62
_NOWHERE = np.empty(0, np.int64)


class Columns(NamedTuple):
    """Ranges of columns, one for each head [l, b, g]."""

    first: Integers
    stop: Integers

    @property
    def counts(self) -> Integers:
        return np.maximum(self.stop - self.first, 0)


class Growth(NamedTuple):
    """What becomes of some sequences."""

    pages: int
    """By how many fewer pages are free afterwards, at most; negative where more are."""

    sequences: Integers
    """[b]."""

    lengths: Integers
    """[l, b, g]: slots afterwards, those that a window has dropped counted too."""

    copied: Integers
    """[n]: where in the flattened table pages stand that are written and that others hold too."""

    taken: Integers
    """[n]: where in the flattened table pages are missing."""

    given_back: Integers
    """[n]: where in the flattened table pages stand that a window has left behind, or that are not needed
    because there are fewer slots than before."""


class PageTables:
    """Lengths and pages of `sequences` sequences."""

    def __init__(
        self,
        windows: Sequence[int | None],
        pool: PagePool,
        *,
        sequences: int,
        heads: int,
        columns: int,
        rewritten: int = 0,
        ring: int = 0,
    ) -> None:
        """`windows`: of each layer, the window in tokens beyond which nobody looks; None: everything is kept.
        When tokens come, so many of a head's last slots may be written again (`rewritten`), and so many of
        its first ones (`ring`, for which no layer may have a window)."""
        assert not ring or not any(windows), "a window gives back the slots of a ring"
        self._pool, self._rewritten, self._ring = pool, rewritten, ring
        self.lengths = np.zeros((len(windows), sequences, heads), np.int64)
        """[l, all sequences, g]: slots so far."""
        kept = [_EVERYTHING if window is None else max(1, window - 1) for window in windows]
        self._kept = np.array(kept, np.int64)[:, None, None]
        self._page_size = pool.key.shape[1]
        self._shared: set[int] = set()
        # Sequences that may hold pages together with others and write to them.
        self._host = np.zeros((len(windows), sequences, heads, columns), np.int32)
        self._begin = np.arange(0, self._host.size, columns).reshape(self.lengths.shape)
        self.table = torch.from_numpy(self._host)
        """int32 [l, all sequences, g, c]: numbers of pages, 0 where there is none."""
        if pool.key.device.type != "cpu":
            self.table = self.table.to(pool.key.device)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on the device."""
        return self.table.numel() * self.table.element_size()

    def begin(self, sequences: Integers) -> Integers:
        """[l, b, g]: where each head's columns begin in the flattened table."""
        return self._begin[:, sequences]

    def pages_at(self, layers: slice, sequences: Integers, columns: Integers) -> Pages:
        """[l, b * g, n]: the pages of some layers at `columns` [b * g, n] of its heads; the last column's
        where there are not so many columns."""
        owned = self._host[layers, sequences]
        owned = owned.reshape(len(owned), -1, owned.shape[-1])
        heads = np.arange(owned.shape[1])[:, None]
        return owned[:, heads, np.minimum(columns, owned.shape[-1] - 1)]

    def places(self, sequences: Integers, slots: Integers) -> Integers:
        """[l, b, g]: where `slots` [l, b, g] lie in the pool, counted in slots."""
        pages = self._pages[self.begin(sequences) + slots // self._page_size]
        return pages * self._page_size + slots % self._page_size

    def owned(self, sequences: Integers) -> Columns:
        """Columns [l, b, g] that hold pages."""
        return self._columns(self.lengths[:, sequences])

    def growth(self, sequences: Integers, lengths: Integers, *, written: bool = True) -> Growth:
        """What it means that `sequences` have `lengths` [l, b, g], longer or shorter than before. What a
        window has dropped does not come back: see `loses`. `written`: new tokens are written."""
        old, new = self.owned(sequences), self._columns(lengths)
        if (
            self._shared.isdisjoint(sequences.tolist())
            and np.array_equal(old.stop, new.stop)
            and np.array_equal(old.first, new.first)
        ):
            return Growth(0, sequences, lengths, _NOWHERE, _NOWHERE, _NOWHERE)
        taken = self._positions(sequences, Columns(np.maximum(old.stop, new.first), new.stop))
        taken = taken[self._pages[taken] == 0]  # others were reserved
        outrun = Columns(old.first, np.minimum(old.stop, new.first))
        cut = Columns(np.maximum(old.first, new.stop), old.stop)
        given_back = np.concatenate([self._positions(sequences, columns) for columns in (outrun, cut)])
        freed = len(given_back) - int(self._is_shared(given_back).sum())
        copied = _NOWHERE
        if written and not self._shared.isdisjoint(sequences.tolist()):
            ring, last = self._rewritten_columns(self.lengths[:, sequences])
            first = np.maximum(np.maximum(old.first, new.first), last)
            last_ones = Columns(first, np.minimum(old.stop, new.stop))
            copied = np.concatenate(
                [self._positions(sequences, part) for part in (Columns(old.first, ring), last_ones)]
            )
            copied = copied[self._is_shared(copied)]
        pages = len(taken) + len(copied) - freed
        return Growth(pages, sequences, lengths, copied, taken, given_back)

    def loses(self, sequences: Integers, lengths: Integers) -> NDArray[np.bool_]:
        """bool [l]: layers of which `sequences` with `lengths` [l, b, g] would have to show what a window has
        dropped."""
        lost = self._columns(lengths).first < self.owned(sequences).first
        return np.asarray(lost.any((1, 2)))

    def apply(self, growth: Growth) -> None:
        """Take the pages from the pool, which has enough, and give back what is not needed any more."""
        self._give_back(growth.given_back)
        self._take(growth)
        self._now_long(growth)

    def reserve(self, growth: Growth) -> bool:
        """Take the pages that are missing, before the tokens come that fill them; lengths stay. False, with
        nothing taken, if the pool has not enough of them as long as nothing is given back."""
        if len(growth.taken) + len(growth.copied) > self._pool.free:
            return False
        self._take(growth)
        return True

    def fill_reserved(self, growth: Growth) -> None:
        """The tokens have come."""
        self._give_back(growth.given_back)
        self._now_long(growth)

    def _take(self, growth: Growth) -> None:
        if len(growth.copied):
            others = self._pages[growth.copied]
            self._write(growth.copied, self._pool.copy(others))
            self._pool.give_back(others)
        if len(growth.taken):
            self._write(growth.taken, self._pool.take(len(growth.taken)))

    def _give_back(self, positions: Integers) -> None:
        if len(positions):
            self._pool.give_back(self._pages[positions])
            self._write(positions, np.zeros(len(positions), np.int32))

    def _now_long(self, growth: Growth) -> None:
        if self._shared:
            # Where a head has fewer slots now, the next tokens may be written to older pages than these were.
            grown = (growth.lengths >= self.lengths[:, growth.sequences]).all((0, 2))
            self._shared.difference_update(growth.sequences[grown].tolist())
        self.lengths[:, growth.sequences] = growth.lengths

    def cut(self, sequences: Integers, lengths: Integers) -> None:
        """`sequences` have `lengths` [l, b, g], which are shorter than before."""
        self.apply(self.growth(sequences, lengths, written=False))
        self._shared.update(sequences.tolist())

    def release(self, sequence: int) -> None:
        """Give all pages of a sequence back."""
        owned = self._host[:, sequence]
        self._pool.give_back(owned[owned > 0])
        owned[:] = 0
        if self.table.device.type != "cpu":
            self.table[:, sequence] = 0
        self.lengths[:, sequence] = 0
        self._shared.discard(sequence)

    def lend(self, sequence: int) -> Pages:
        """The pages of a sequence, head by head, the oldest first.
        From now on it need not be the only one that holds them."""
        self._shared.add(sequence)
        index = np.array([sequence])
        return self._pages[self._positions(index, self.owned(index))]

    def fill(self, sequence: int, lengths: Integers, pages: Pages, held: Integers) -> None:
        """Let an empty sequence hold, of the `pages` of a snapshot with `lengths` [l, 1, g], those that the
        first slots, `held` [l, 1, g] of them, lie in."""
        index, there, wanted = np.array([sequence]), self._columns(lengths), self._columns(held)
        # Where each head's pages begin in `pages`, as if its column 0 were there.
        begin = (np.cumsum(there.counts) - there.counts.ravel()).reshape(lengths.shape) - there.first
        shared = pages[_ranges(begin + wanted.first, wanted.counts)]
        self._pool.share(shared)
        self._write(self._positions(index, wanted), shared)
        self.lengths[:, index] = held
        self._shared.add(sequence)

    def pages_to_begin(self, tokens: int, held: Integers) -> int:
        """Pages that a sequence takes, at most, which begins from a snapshot's first slots, `held` [l, 1, g],
        and takes in so many tokens."""
        old, new = self._columns(held), self._columns(held + tokens)
        ring, last = self._rewritten_columns(held)
        last_ones = new.stop - np.maximum(np.maximum(last, new.first), old.first)
        return int((ring + np.maximum(last_ones, 0)).sum())

    def fewest_tokens(self, lengths: Integers) -> int:
        """Fewest tokens that can be had of a sequence with `lengths` [l, 1, g] that keeps every token: what a
        window has dropped cannot be seen."""
        first = self._columns(lengths).first
        return int(np.where(first > 0, first * self._page_size + self._kept, 0).max())

    def _rewritten_columns(self, lengths: Integers) -> tuple[Integers, Integers]:
        """Where tokens that come after `lengths` slots are written: to columns in front of the first result,
        and to those from the second one on, which is not smaller. Both like `lengths`."""
        last = np.maximum(lengths - self._rewritten, 0) // self._page_size
        return np.minimum(-(-self._ring // self._page_size), last), last

    def _columns(self, lengths: Integers) -> Columns:
        """The pages that hold what `lengths` slots leave to be seen."""
        return Columns(np.maximum(lengths - self._kept, 0) // self._page_size, -(-lengths // self._page_size))

    def _positions(self, sequences: Integers, columns: Columns) -> Integers:
        """[n]: where these columns stand in the flattened table."""
        return _ranges(self.begin(sequences) + columns.first, columns.counts)

    @property
    def _pages(self) -> Pages:
        """The table, flattened."""
        return self._host.reshape(-1)

    def _is_shared(self, positions: Integers) -> NDArray[np.bool_]:
        """bool [n]: whether others hold the pages too that stand there."""
        return self._pool.shared(self._pages[positions])

    def _write(self, positions: Integers, pages: NDArray[np.int32]) -> None:
        self._pages[positions] = pages
        if self.table.device.type != "cpu":
            index, new = (torch.from_numpy(array).to(self.table.device) for array in (positions, pages))
            self.table.view(-1)[index] = new


def _ranges(first: Integers, counts: Integers) -> Integers:
    """[n]: `counts` numbers from each of `first` on, one range behind the other."""
    counts, total = counts.ravel(), int(counts.sum())
    if total == 0:
        return _NOWHERE
    return np.arange(total) + (first.ravel() - np.cumsum(counts) + counts).repeat(counts)
