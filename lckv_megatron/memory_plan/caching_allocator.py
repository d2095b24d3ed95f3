"""PyTorch's CUDA caching allocator, simulated on one stream of a GPU whose memory suffices.

Its rules, with its default settings:
- Sizes are rounded up to 512 bytes. Requests of at most 1 MiB and larger ones have a pool each.
- The smallest free block that fits serves; of equal ones that with the lowest address. What is left of it
  becomes a free block: of small requests always, of large ones where it has more than 1 MiB.
- Where none fits, a segment is reserved: 2 MiB for small requests, 20 MiB for those below 10 MiB, else the
  size rounded up to 2 MiB. A block that is freed joins its free neighbours in its segment.
- `expandable_segments`: a pool has one segment, which grows at its end by 2 MiB (small) or 20 MiB (large) at
  a time. A free block at that end counts as larger than all others. What is left of a block is always split.

Segments get ascending addresses here. Nothing is given back: that happens where memory is short.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from lckv_megatron.memory_plan.requests import Request, events

_MIB = 2**20
ROUNDING = 512
"""Bytes of which every block is a multiple."""
SMALL_REQUEST = _MIB
"""Bytes of the largest request of the small pool."""
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * _MIB, 20 * _MIB
_OWN_SEGMENT = 10 * _MIB
"""Bytes from which on a request has a segment of its own size."""
_SEGMENT_ROUNDING = 2 * _MIB


@dataclass(frozen=True)
class Reserved:
    """Bytes at their highest."""

    reserved: int
    live: int
    """Of requests, rounded."""

    @property
    def fragmentation(self) -> float:
        """Share of the reserved bytes that no request ever needed at a time."""
        return 1 - self.live / self.reserved if self.reserved else 0.0


def run(requests: Iterable[Request], *, expandable: bool) -> Reserved:
    """The allocator's bytes behind all `requests`."""
    allocator = CachingAllocator(expandable=expandable)
    blocks: dict[Request, Block] = {}
    for begins, request in events(requests):
        if begins:
            blocks[request] = allocator.allocate(request.bytes)
        else:
            allocator.free(blocks.pop(request))
    return Reserved(allocator.reserved, allocator.most_live)


@dataclass(eq=False, slots=True)
class Block:
    """A stretch of a segment, in use or free."""

    pool: "_Pool"
    address: int
    bytes: int
    used: int = 0
    """Bytes of the request that it serves; a block that is not split has more."""
    free: bool = False
    previous: "Block | None" = None
    following: "Block | None" = None
    """Its neighbours in the segment."""


class CachingAllocator:
    """Two pools, of small and of large requests."""

    def __init__(self, *, expandable: bool) -> None:
        """`expandable`: with `expandable_segments:True`."""
        make = _ExpandablePool if expandable else _Pool
        self._small, self._large = make(small=True), make(small=False)
        self.live = self.most_live = 0

    @property
    def reserved(self) -> int:
        """Bytes of all segments: they are never given back, so this is the most, too."""
        return self._small.reserved + self._large.reserved

    def allocate(self, number: int) -> Block:
        """A block of at least so many bytes."""
        rounded = max(1, -(-number // ROUNDING)) * ROUNDING
        pool = self._small if rounded <= SMALL_REQUEST else self._large
        block = pool.allocate(rounded)
        block.used = rounded
        self.live += block.used
        self.most_live = max(self.most_live, self.live)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool."""
        self.live -= block.used
        block.pool.release(block)


@dataclass(eq=False)
class _Pool:
    small: bool
    reserved: int = 0
    _free: dict[tuple[int, int], Block] = field(default_factory=dict)
    _order: list[tuple[int, int]] = field(default_factory=list)
    """Bytes and address of the free blocks, ascending."""

    def allocate(self, number: int) -> Block:
        place = bisect_left(self._order, (number, 0))
        if place < len(self._order):
            return self._use(self._free[self._order[place]], number)
        return self._use(self._grow(number), number)

    def release(self, block: Block) -> None:
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.free:
                self._forget(neighbour)
                _join(block, neighbour)
        self._keep(block)

    def _grow(self, number: int) -> Block:
        """A free block with room for `number` bytes, in memory that is reserved for it."""
        size = _SMALL_SEGMENT
        if not self.small:
            size = _LARGE_SEGMENT if number < _OWN_SEGMENT else _round_up(number, _SEGMENT_ROUNDING)
        block = Block(self, self.reserved, size)
        self.reserved += size
        self._keep(block)
        return block

    def _use(self, block: Block, number: int) -> Block:
        self._forget(block)
        left = block.bytes - number
        if self._splits(left):
            rest = Block(self, block.address + number, left, previous=block, following=block.following)
            if rest.following is not None:
                rest.following.previous = rest
            block.bytes, block.following = number, rest
            self._keep(rest)
        return block

    def _splits(self, left: int) -> bool:
        return left >= ROUNDING if self.small else left > SMALL_REQUEST

    def _keep(self, block: Block) -> None:
        block.free = True
        key = block.bytes, block.address
        self._free[key] = block
        insort(self._order, key)

    def _forget(self, block: Block) -> None:
        block.free = False
        key = block.bytes, block.address
        del self._free[key]
        del self._order[bisect_left(self._order, key)]


class _ExpandablePool(_Pool):
    """One segment; `_last` is the block at its end."""

    _last: Block | None = None

    def allocate(self, number: int) -> Block:
        place = bisect_left(self._order, (number, 0))
        fitting = (self._free[key] for key in self._order[place : place + 2])
        block = next((block for block in fitting if block is not self._last), None)
        if block is None:
            block = self._grow(number)
        used = self._use(block, number)
        if block is self._last and block.following is not None:
            self._last = block.following
        return used

    def release(self, block: Block) -> None:
        super().release(block)
        if block.following is None:
            self._last = block

    def _grow(self, number: int) -> Block:
        """The last block where it is free, lengthened as far as `number` bytes need."""
        last = self._last
        missing = number - (last.bytes if last is not None and last.free else 0)
        added = 0
        if missing > 0:
            added = _round_up(missing, _SMALL_SEGMENT if self.small else _LARGE_SEGMENT)
        block = Block(self, self.reserved, added, previous=last)
        self.reserved += added
        if last is not None and last.free:
            self._forget(last)
            last.bytes += added
            block = last
        elif last is not None:
            last.following = block
        self._last = block
        self._keep(block)
        return block

    def _splits(self, left: int) -> bool:
        return left >= ROUNDING


def _join(block: Block, neighbour: Block) -> None:
    """`block` takes in its neighbour."""
    if neighbour is block.previous:
        block.address, block.previous = neighbour.address, neighbour.previous
        if block.previous is not None:
            block.previous.following = block
    else:
        block.following = neighbour.following
        if block.following is not None:
            block.following.previous = block
    block.bytes += neighbour.bytes


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
