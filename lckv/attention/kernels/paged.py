# mypy: disallow-untyped-defs=False
"""Decoding attention over ragged paged slots as two Triton kernels.

A program of the first kernel attends one chunk of one KV head after the other: it loads the chunk's pages
once for all query heads of the group, and leaves their output and the logsumexp of their scores. How many
chunks there are it reads on the device, so a list with room for more costs no more. A program of the second
merges what came of the chunks of one head. There are no atomics: every run gives the same bits.

Shapes: as in `lckv.attention.pages`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lckv.attention.pages import Pages, PagesAttended, Work, pages_of_a_chunk, tiles_of_the_kernel

_MOST_PROGRAMS = 1024
"""Of a launch: several for each multiprocessor of any GPU."""


def attend_paged(
    query: Tensor,
    pages: Pages,
    work: Work,
    first: Tensor | None,
    stop: Tensor,
    without: Tensor | None = None,
    *,
    scale: float,
) -> PagesAttended:
    """Same contract as `lckv.attention.paged.attend_paged`, where `why_not_kernel` says nothing."""
    rows, query_heads, channels = query.shape
    heads, page_size = stop.numel(), pages.key.shape[1]
    group = rows * query_heads // heads
    chunk_pages = pages_of_a_chunk(page_size, query.device.type)
    query, stop = query.contiguous(), stop.contiguous()
    part, output = (
        torch.empty(number, group, channels, dtype=torch.float32, device=query.device)
        for number in (len(work.head), heads)
    )
    part_lse, lse = (
        torch.empty(number, group, dtype=torch.float32, device=query.device)
        for number in (len(work.head), heads)
    )
    slots = chunk_pages * page_size
    tiles = tiles_of_the_kernel(group, channels, slots, query.element_size())
    assert tiles is not None
    sizes = {"GROUP": tiles.group, "CHANNELS": tiles.channels}
    with torch.cuda.device_of(query):  # Triton launches on the current device
        if len(work.head):
            _attend_chunk[(min(len(work.head), _MOST_PROGRAMS),)](
                query, pages.key, pages.value, pages.table, work.head, work.first_slot, work.block,
                work.bounds, stop if first is None else first.contiguous(), stop,
                stop if without is None else without.contiguous(), part, part_lse,
                scale, page_size, chunk_pages, heads, group, channels, HAS_FIRST=first is not None,
                HAS_WITHOUT=without is not None, CHUNK=slots, SLOTS=tiles.slots, **sizes,
            )  # fmt: skip
        _merge[(heads,)](part, part_lse, work.bounds, output, lse, group, channels, **sizes)
    return PagesAttended(output.view(query.shape), lse.view(query.shape[:-1]))


@triton.jit
def _attend_chunk(
    query, key, value, table, head_of, first_slot_of, block_of, bounds, first, stop, without, output, lse,
    scale, page_size, chunk_pages, heads, group, channels,
    HAS_FIRST: tl.constexpr, HAS_WITHOUT: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    member, channel = tl.arange(0, GROUP), tl.arange(0, CHANNELS)
    inside = (member < group)[:, None] & (channel < channels)[None, :]
    number = tl.program_id(0)
    count = tl.load(bounds + heads)
    while number < count:  # the list may have room for more
        head, first_slot = tl.load(head_of + number), tl.load(first_slot_of + number)
        pages = table + tl.load(block_of + number) * chunk_pages
        # Within the chunk.
        end = tl.load(stop + head) - first_slot
        begin = end * 0
        if HAS_FIRST:
            begin = tl.load(first + head) - first_slot
        gap = end
        if HAS_WITHOUT:
            gap = tl.load(without + head) - first_slot
        place = (head * group + member)[:, None] * channels + channel[None, :]
        queries = tl.load(query + place, inside, 0.0)
        peak = tl.full([GROUP], -float("inf"), tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        mean = tl.zeros([GROUP, CHANNELS], tl.float32)
        for start in range(0, CHUNK, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            seen = (slot >= begin) & (slot < end) & (slot != gap) & (slot < CHUNK)
            page = tl.load(pages + slot // page_size, seen, 0).to(tl.int64)
            source = (page * page_size + slot % page_size)[:, None] * channels + channel[None, :]
            there = seen[:, None] & (channel < channels)[None, :]
            keys = tl.load(key + source, there, 0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            weights = tl.exp(scores - base[:, None])
            kept = tl.exp(peak - base)
            values = tl.load(value + source, there, 0.0)
            mean = mean * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            total = total * kept + tl.sum(weights, 1)
            peak = new_peak
        total = tl.where(total > 0, total, 1.0)  # where nothing was seen, the peak says so
        mean = mean / total[:, None]
        part = number.to(tl.int64) * group + member
        tl.store(output + part[:, None] * channels + channel[None, :], mean, inside)
        tl.store(lse + part, peak + tl.log(total), member < group)
        number += tl.num_programs(0)


@triton.jit
def _merge(part, part_lse, bounds, output, lse, group, channels, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    head = tl.program_id(0)
    member, channel = tl.arange(0, GROUP), tl.arange(0, CHANNELS)
    inside = (member < group)[:, None] & (channel < channels)[None, :]
    peak = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    mean = tl.zeros([GROUP, CHANNELS], tl.float32)
    number = tl.load(bounds + head)
    end = tl.load(bounds + head + 1)
    while number < end:
        of_chunk = tl.load(part_lse + number * group + member, member < group, -float("inf"))
        features = tl.load(
            part + (number * group + member)[:, None] * channels + channel[None, :], inside, 0.0
        )
        new_peak = tl.maximum(peak, of_chunk)
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        kept, share = tl.exp(peak - base), tl.exp(of_chunk - base)
        mean = mean * kept[:, None] + features * share[:, None]
        total = total * kept + share
        peak = new_peak
        number += 1
    total = tl.where(total > 0, total, 1.0)
    mean = mean / total[:, None]
    tl.store(output + (head * group + member)[:, None] * channels + channel[None, :], mean, inside)
    tl.store(lse + head * group + member, peak + tl.log(total), member < group)
