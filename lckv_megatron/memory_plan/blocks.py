"""The two levels: the requests of a layer's forward and backward first, then layers as blocks in the step.

A step is cut into cells: the forwards and backwards of layers, and what lies between them. A block is what
one run of a layer requests in its forward and backward, or what is requested and dropped in one cell between
layers. Blocks with equal requests at equal times are of one kind, and each kind is placed once:

- what is kept from forward to backward fills the block's lowest addresses without holes, so that between
  them the block is as large as what it keeps; what is short-lived lies in it before and after, and above
- requests that are there at the same times are merged, and so are the small ones that are kept (at most
  1 MiB, as in the small pool of PyTorch's allocator); other small ones are put by first fit into what is left

Loose are requests that outlive a backward, or a forward without being kept until a backward. The second level
places blocks, which keep their inner addresses, and loose requests. It is tried twice: what a run keeps and
what lives shortly in its forward and its backward are one block, or three, which is better in a pipeline.
"""

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lckv_megatron.memory_plan.caching_allocator import SMALL_REQUEST
from lckv_megatron.memory_plan.placement import Body, Placement, first_fit, place
from lckv_megatron.memory_plan.requests import Request, live_peak, merged
from lckv_megatron.memory_plan.trace import DIRECTIONS, Stretch


@dataclass(eq=False)
class Block:
    """Requests of one run of a layer, or of one stretch between layers."""

    name: str
    forward: Stretch
    """Its first stretch."""
    backward: Stretch | None
    requests: list[Request] = field(default_factory=list)

    @property
    def kept(self) -> list[Request]:
        """What is there behind the forward, in the order in which it came; of blocks without a backward
        nothing."""
        if self.backward is None:
            return []
        return [request for request in self.requests if request.start < self.forward.end < request.end]

    def local(self) -> list[Request]:
        """The requests in the block's own time: forward, and backward at once behind it."""
        return [
            Request(request.bytes, self._local(request.start), self._local(request.end))
            for request in self.requests
        ]

    def _local(self, event: int) -> int:
        if self.backward is None or event < self.forward.end:
            return event - self.forward.start
        return self.forward.end - self.forward.start + max(0, event - self.backward.start)


@dataclass(frozen=True, eq=False)
class Kind:
    """Blocks with equal requests at equal times."""

    name: str
    blocks: int
    """How many there are."""
    requests: int
    """Of each."""
    small: int
    """Of those, put by first fit behind the others."""
    placed: int
    """Bodies that the first level has placed: large requests, merged."""
    live_peak: int
    peak: int
    """Bytes, small requests included."""
    kept: int
    """Bytes from forward to backward."""
    placement: Placement
    """Of the large requests."""

    @property
    def how(self) -> str:
        """How it was placed, and how much lower the optimum may be."""
        if self.peak <= self.live_peak:
            return "live peak reached"
        gap = f"at most {100 * (1 - self.live_peak / self.peak):.1f} % too high"
        return f"{'first fit' if self.placement.how == 'live peak reached' else self.placement.how}, {gap}"


@dataclass(frozen=True, eq=False)
class StepPlacement:
    """Both levels of a step."""

    kinds: list[Kind]
    """The largest first."""
    kept: frozenset[Request]
    """From a layer's forward to its backward."""
    whole: bool
    """Whether a run of a layer is one block, not three."""
    loose: int
    """Requests in no block."""
    addresses: dict[Request, int]
    placement: Placement
    """Of blocks and loose requests."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.placement.peak


def place_step(
    requests: Sequence[Request], stretches: Sequence[Stretch], *, seconds: float = 10.0
) -> StepPlacement:
    """Place the requests of a step, runs of layers as whole blocks and as three, and give the better. An
    integer program takes at most so many seconds."""
    whole = _place(requests, stretches, seconds, whole=True)
    if whole.placement.how == "live peak reached":
        return whole
    parts = _place(requests, stretches, seconds, whole=False)
    return min(whole, parts, key=lambda placement: placement.peak)


def _place(
    requests: Sequence[Request], stretches: Sequence[Stretch], seconds: float, *, whole: bool
) -> StepPlacement:
    blocks, loose = cut(requests, stretches, whole=whole)
    of_kind: dict[tuple[tuple[int, int, int], ...], list[Block]] = defaultdict(list)
    for block in blocks:
        of_kind[tuple((request.bytes, request.start, request.end) for request in block.local())].append(block)
    kinds, bodies = [], []
    for alike in of_kind.values():
        kind, offsets = _place_kind(alike, seconds)
        kinds.append(kind)
        bodies += [Body(tuple(block.requests), offsets) for block in alike]
    bodies += map(Body.of, loose)
    placement = place(bodies, seconds=seconds)
    addresses = {
        request: address + offset
        for body, address in zip(bodies, placement.addresses, strict=True)
        for request, offset in zip(body.requests, body.offsets, strict=True)
    }
    return StepPlacement(
        kinds=sorted(kinds, key=lambda kind: -kind.peak),
        kept=frozenset(request for block in blocks for request in block.kept),
        whole=whole,
        loose=len(loose),
        addresses=addresses,
        placement=placement,
    )


def cut(
    requests: Iterable[Request], stretches: Sequence[Stretch], *, whole: bool
) -> tuple[list[Block], list[Request]]:
    """Blocks that have requests, and loose requests. `whole`: one block for a run; else what it keeps, its
    forward and its backward are three."""
    cells = _cells(stretches)
    starts = [cell.start for cell in cells]
    forwards = {cell.run: cell for cell in cells if cell.direction == "forward"}
    backwards = {cell.run: cell for cell in cells if cell.direction == "backward"}
    blocks: dict[tuple[int, str], Block] = {}
    loose = []
    for request in sorted(requests, key=lambda request: request.start):
        born, gone = (cells[bisect_right(starts, event) - 1] for event in (request.start, request.end))
        backward = backwards.get(born.run)
        kept = born is not gone
        if kept and (born is backward or not _until(gone, backward)):
            loose.append(request)
            continue
        part = "" if whole or born.run < 0 else "kept" if kept else born.direction
        if (born.run, part) not in blocks:
            first, last = (born, None) if part in DIRECTIONS else (forwards[born.run], backward)
            blocks[born.run, part] = Block(f"{born.name}, {part}".rstrip(", "), first, last)
        blocks[born.run, part].requests.append(request)
    return list(blocks.values()), loose


def kept_sizes(requests: Iterable[Request], stretches: Sequence[Stretch]) -> dict[int, tuple[int, ...]]:
    """By layer, the bytes of each storage that is kept from its forward to its backward, as they come; of
    several runs of a layer, those of the run that keeps most. Two buffers into which layers take turns need
    as many bytes each as the layer that keeps most."""
    sizes: dict[int, tuple[int, ...]] = {}
    for block in cut(requests, stretches, whole=False)[0]:
        kept, layer = tuple(request.bytes for request in block.kept), block.forward.layer
        if sum(kept) > sum(sizes.get(layer, ())):
            sizes[layer] = kept
    return sizes


def _until(gone: Stretch, backward: Stretch | None) -> bool:
    """Whether what goes there is kept for backward: gone in it, or in one of the layers behind."""
    return backward is not None and gone.direction == "backward" and gone.start <= backward.start


def _cells(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Stretches in the order of time, and what lies before, between and behind them as runs of their own,
    with negative numbers."""
    cells: list[Stretch] = []
    now = -1
    for stretch in sorted(stretches, key=lambda stretch: stretch.start):
        if now < stretch.start:
            cells.append(Stretch("between layers", 0, -len(cells) - 1, "forward", now, stretch.start))
        cells.append(stretch)
        now = stretch.end
    cells.append(Stretch("between layers", 0, -len(cells) - 1, "forward", now, now + 1))
    return cells


def _place_kind(blocks: Sequence[Block], seconds: float) -> tuple[Kind, tuple[int, ...]]:
    """What is said of blocks that are alike, and the addresses of their requests."""
    block, requests = blocks[0], blocks[0].local()
    ids = {*block.kept}
    kept = [local for request, local in zip(block.requests, requests, strict=True) if request in ids]
    bodies = _bodies(requests, kept)
    small = [request for request in requests if request.bytes <= SMALL_REQUEST and request not in {*kept}]
    placement = place(bodies, seconds=seconds)
    address_of = {
        request: address + offset
        for body, address in zip(bodies, placement.addresses, strict=True)
        for request, offset in zip(body.requests, body.offsets, strict=True)
    }
    whole = [Body(tuple(address_of), tuple(address_of.values()))] if address_of else []
    last = first_fit([*whole, *map(Body.of, small)])
    address_of.update(zip(small, last[len(whole) :], strict=True))
    kind = Kind(
        name=block.name,
        blocks=len(blocks),
        requests=len(requests),
        small=len(small),
        placed=len(bodies),
        live_peak=live_peak(requests),
        peak=max(address + request.bytes for request, address in address_of.items()),
        kept=sum(request.bytes for request in kept),
        placement=placement,
    )
    return kind, tuple(address_of[request] for request in requests)


def _bodies(requests: Sequence[Request], kept: Sequence[Request]) -> list[Body]:
    """What the first level places: large requests, merged, and the small ones of those that are kept."""
    ceiling, are_kept = sum(request.bytes for request in kept), {*kept}
    bodies = [_stacked([request for request in kept if request.bytes <= SMALL_REQUEST], ceiling)]
    for group in merged([request for request in requests if request.bytes > SMALL_REQUEST]):
        bodies.append(_stacked([request for request in group if request in are_kept], ceiling))
        bodies.append(_stacked([request for request in group if request not in are_kept], None))
    return [body for body in bodies if body.requests]


def _stacked(group: Sequence[Request], ceiling: int | None) -> Body:
    """One above the other."""
    tops = itertools.accumulate((request.bytes for request in group), initial=0)
    return Body(tuple(group), tuple(tops)[:-1], ceiling)
