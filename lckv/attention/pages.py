"""Slots that lie in pages all over a pool, heads of any lengths, and the list of what attention to them has
to look at.

The slots of every head are cut into chunks of whole pages; the work is a list of the chunks that hold
something. So it grows with the slots there are, not with the longest head times the number of heads.

Shapes: b rows, h query heads, g KV heads, d channels, p pages of n slots,
c pages of a chunk, w chunks in the list.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lckv.sharing.mixing import Second

_SLOTS_OF_A_CHUNK = {"cpu": 64}
_SLOTS_OF_A_CHUNK_ELSEWHERE = 256
_MOST_COPIED = 1.25
"""So many times the pages that are seen may be copied to attend to as many of every head."""
_SLOTS_OF_A_STEP = 64
_NO_SLOT = 2**40
"""Where a chunk begins that holds nothing."""
_LEAST = 16
"""Smallest size of a matrix that the tensor cores take."""
_SHARED_BYTES = 96 * 2**10
"""Every NVIDIA GPU from Ampere on gives 99 KiB of shared memory to a program of a kernel; an A100 163, an
H100 227."""


class Pages(NamedTuple):
    """What one layer keeps."""

    key: Tensor
    """[p, n, d]: the pool. Page 0 is owned by nobody; its slots, and those of owned pages that are not in
    use, are finite."""

    value: Tensor
    """[p, n, d]."""

    table: Tensor
    """int32 [table rows, multiple of c], contiguous: the pages of each head, in order of their slots; 0 where
    it owns none."""


class Also(NamedTuple):
    """The other layer of which a layer reads, where it reads two."""

    pages: Tensor
    """Like the pages of the first one, wherever these are given: numbers of pages, or a table of them."""

    second: Second


def copy_pages(pages: Pages, owned: Tensor, also: Also | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values [pages, n, d] that a layer reads, of the pages `owned`, int [pages]."""
    if also is None or also.second.mixture is None:
        of_values = owned if also is None else also.pages
        return pages.key.index_select(0, owned), pages.value.index_select(0, of_values)
    first, second = (
        (pages.key.index_select(0, numbers), pages.value.index_select(0, numbers))
        for numbers in (owned, also.pages)
    )
    return also.second.joined(first, second, copies=True)


class Work(NamedTuple):
    """Chunks to attend to, those of one head side by side; int64. A head is its row's number times g plus its
    number in the row."""

    head: Tensor
    """[w]: whose chunk it is."""

    first_slot: Tensor
    """[w]: the slot that it begins with."""

    block: Tensor
    """[w]: where its pages stand in the table, in units of c columns."""

    bounds: Tensor
    """[b * g + 1]: where each head's chunks begin in this list, and how many there are at the end: w, or
    fewer where the list has room for more."""


class CopiedPages(NamedTuple):
    """What one query per head sees of as many pages of every head, copied side by side."""

    slots: int
    """Of a head, all its pages together."""

    mask: Tensor | None
    """[b * g, 1, 1, slots of `seen`], in the dtype of queries: -inf where a slot is not seen; None: all are.
    """

    place: Tensor
    """int64 [b * g]: where each head's new key goes in the copies, one head's slots behind the other's."""

    seen: slice
    """Slots beyond which nothing is seen of any head."""

    def without(self, slot: Tensor, dtype: torch.dtype) -> "CopiedPages":
        """Where one slot of each head that was seen is not, int64 [b, g]; -1: all are. Slot 0 was seen.
        `dtype`: of queries."""
        slot, mask = slot.reshape(-1, 1, 1, 1), self.mask
        if mask is None:
            width = self.seen.stop - self.seen.start
            mask = torch.zeros(len(slot), 1, 1, width, dtype=dtype, device=slot.device)
        hidden = torch.zeros(slot.shape, dtype=dtype, device=slot.device).masked_fill(slot >= 0, -torch.inf)
        return self._replace(mask=mask.scatter(3, slot.clamp(min=0), hidden))


class PagesAttended(NamedTuple):
    """Attention to a part of the keys."""

    output: Tensor
    """float32 [b, h, d]; 0 where nothing is seen."""

    lse: Tensor
    """float32 [b, h]: logsumexp of the scores; -inf where nothing is seen."""


class Tiles(NamedTuple):
    """Sizes of the matrices that one program of the kernel multiplies; powers of two."""

    group: int
    """Query heads of one KV head."""

    channels: int

    slots: int
    """Slots per step."""


def tiles_of_the_kernel(group: int, channels: int, chunk_slots: int, element_bytes: int) -> Tiles | None:
    """For `group` query heads per KV head and chunks of `chunk_slots`; None where the tiles of even the
    shortest step are larger than the shared memory."""
    group, channels = (max(_LEAST, _power_of_two(size)) for size in (group, channels))
    slots = min(_SLOTS_OF_A_STEP, max(_LEAST, _power_of_two(chunk_slots)))
    # Keys, values, queries, weighted values; test_compiled_kernels.py shows that the compiler needs no more.
    while 2 * element_bytes * channels * (slots + group) > _SHARED_BYTES:
        slots //= 2
        if slots < _LEAST:
            return None
    return Tiles(group, channels, slots)


def _power_of_two(size: int) -> int:
    """The next one at or above `size`."""
    return 1 << (size - 1).bit_length()


def pages_of_a_chunk(page_size: int, device_type: str) -> int:
    """c, for pages of n = `page_size` slots."""
    return max(1, _SLOTS_OF_A_CHUNK.get(device_type, _SLOTS_OF_A_CHUNK_ELSEWHERE) // page_size)


class WorkOnHost(NamedTuple):
    """`Work` as the host makes it."""

    head: NDArray[np.int64]
    first_slot: NDArray[np.int64]
    block: NDArray[np.int64]
    bounds: NDArray[np.int64]


def work_on_host(
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
    table_row: NDArray[np.int64],
    *,
    page_size: int,
    columns: int,
    device_type: str,
) -> WorkOnHost:
    """See `list_work`."""
    pages = pages_of_a_chunk(page_size, device_type)
    begin, end = first // (pages * page_size), -(-stop // (pages * page_size))
    counts = np.maximum(end - begin, 0)
    bounds = np.concatenate(([0], counts.cumsum()))
    head = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(bounds[-1]) - (bounds[:-1] - begin)[head]
    block = table_row[head] * (columns // pages) + chunk
    return WorkOnHost(head, chunk * (pages * page_size), block, bounds)


def list_work(
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
    table_row: NDArray[np.int64],
    *,
    page_size: int,
    columns: int,
    device: torch.device,
) -> Work:
    """The chunks that hold slots `first` .. `stop` - 1 of each head; all [b * g]. `table_row` is the head's
    row in a table of `columns` columns."""
    work = work_on_host(first, stop, table_row, page_size=page_size, columns=columns, device_type=device.type)
    flat = torch.from_numpy(np.concatenate(work)).to(device)
    return Work(*flat.split([len(part) for part in work]))


class PaddedWork:
    """A list of work in memory that stays where it is, with room for more: what a step reads that is launched
    again and again as it was captured.

    Of its `capacity` entries those that the last of `bounds` counts are work; the others hold no slots of
    anybody."""

    def __init__(self, heads: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        sizes = [capacity, capacity, capacity, heads + 1]
        self._host = torch.zeros(sum(sizes), dtype=torch.int64)
        self._flat = self._host if device.type == "cpu" else self._host.to(device)
        self._parts = WorkOnHost(*(part.numpy() for part in self._host.split(sizes)))
        self._parts.first_slot[:] = _NO_SLOT
        self.work = Work(*self._flat.split(sizes))

    def fill(self, work: WorkOnHost) -> None:
        """Let it be this work, of at most `capacity` entries."""
        if self._is(work):
            return
        count = len(work.head)
        for own, new, nothing in zip(self._parts[:3], work[:3], (0, _NO_SLOT, 0), strict=True):
            own[:count], own[count:] = new, nothing
        self._parts.bounds[:] = work.bounds
        if self._flat is not self._host:
            self._flat.copy_(self._host)

    def _is(self, work: WorkOnHost) -> bool:
        """Whether it is this work already."""
        count = self._parts.bounds[-1]
        parts = (*(part[:count] for part in self._parts[:3]), self._parts.bounds)
        return all(np.array_equal(own, new) for own, new in zip(parts, work, strict=True))


def copy_evenly(
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
    *,
    own: bool,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[NDArray[np.int64], CopiedPages] | None:
    """How to attend to slots `first` .. `stop` - 1 of each head [b * g], and to one more key behind them if
    `own`: the columns of the table to copy, [b * g, columns], and what is seen of them. None where heads have
    so different numbers of slots that copies would be much larger than what is seen, or where a head would
    see nothing."""
    end = stop + int(own)
    begin = first // page_size
    columns = -(-end // page_size) - begin
    widest = int(columns.max())
    if (end <= first).any() or widest * len(columns) > _MOST_COPIED * (columns.sum() + len(columns)):
        return None
    slots = widest * page_size
    offset = begin * page_size
    place = torch.from_numpy(np.arange(len(stop)) * slots + np.minimum(stop - offset, slots - 1)).to(device)
    lowest, highest = first - offset, end - offset
    copied = begin[:, None] + np.arange(widest)
    if (lowest == lowest[0]).all() and (highest == highest[0]).all():
        return copied, CopiedPages(slots, None, place, slice(int(lowest[0]), int(highest[0])))
    numbers = np.arange(slots)
    hidden = (numbers < lowest[:, None]) | (numbers >= highest[:, None])
    mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0))).to(device, dtype)
    return copied, CopiedPages(slots, mask[:, None, None], place, slice(0, slots))
