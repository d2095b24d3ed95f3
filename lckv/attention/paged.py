"""Attention of one query per head to slots in pages: `attend_paged` chooses between the Triton kernel of
`kernels.paged` and its twin here.

Every chunk of the list of work is attended by itself, and what comes of a head's chunks is merged by the
logsumexp of their scores. Where there is no kernel and heads have about as many slots, it takes fewer
operations to copy as many pages of every head side by side: `attend_copied`.

Shapes: as in `lckv.attention.pages`.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lckv.attention.pages import (
    Also,
    CopiedPages,
    Pages,
    PagesAttended,
    Work,
    copy_pages,
    pages_of_a_chunk,
    tiles_of_the_kernel,
)

_BYTES_AT_ONCE = 2**20
"""Keys, and as many values, that the twin copies out of their pages at once: what stays in the cache of a CPU
core is read back at little cost."""
_COPIED_AT_ONCE = 2**19
"""The same of `attend_copied`, which reads them in one more operation."""


@cache
def why_not_kernel(device_type: str, dtype: torch.dtype, group: int, channels: int) -> str | None:
    """What keeps the Triton kernel from serving such tensors, `group` query heads of `channels` per KV head;
    None if nothing does."""
    if device_type != "cuda":
        return f"the Triton kernel needs CUDA tensors, the model is on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel takes float32, bfloat16 and float16, not {dtype}"
    if tiles_of_the_kernel(group, channels, 1, dtype.itemsize) is None:
        return (
            f"{group} query heads of {channels} channels per KV head in {dtype} are more than the Triton "
            "kernel's shared memory holds"
        )
    return None


def why_not_kernel_for(query: Tensor, value: Tensor) -> str | None:
    """The same for `query` [b, h, ...] and values [..., g, d]."""
    group = query.shape[1] // value.shape[-2]
    return why_not_kernel(query.device.type, query.dtype, group, value.shape[-1])


def attend_paged(
    query: Tensor,
    pages: Pages,
    work: Work,
    first: Tensor | None,
    stop: Tensor,
    without: Tensor | None = None,
    *,
    scale: float,
    also: Also | None = None,
) -> PagesAttended:
    """softmax(scale * query key^T) value over slots first .. stop - 1 of each head but `without`; `query`
    [b, h, d], `first` (None: 0), `stop` and `without` (None: all) int64 [b, g]. `work` covers these slots;
    others that it covers are not seen. Softmax is float32. `also`: the table of the other layer, of a query
    that reads two, which the kernel does not."""
    group, channels = query.shape[0] * query.shape[1] // stop.numel(), query.shape[2]
    if also is None and why_not_kernel(query.device.type, query.dtype, group, channels) is None:
        from lckv.attention.kernels.paged import attend_paged as fused

        return fused(query, pages, work, first, stop, without, scale=scale)
    return attend_in_torch(query, pages, work, first, stop, without, scale=scale, also=also)


def attend_in_torch(
    query: Tensor,
    pages: Pages,
    work: Work,
    first: Tensor | None,
    stop: Tensor,
    without: Tensor | None = None,
    *,
    scale: float,
    also: Also | None = None,
) -> PagesAttended:
    """Same contract as `attend_paged`."""
    heads, channels = stop.numel(), query.shape[-1]
    page_size = pages.key.shape[1]
    count = pages_of_a_chunk(page_size, query.device.type)

    def pages_in(table: Tensor, block: Tensor) -> Tensor:
        return table.view(-1, count).index_select(0, block).flatten()

    slots = torch.arange(count * page_size, device=query.device)
    grouped = query.reshape(heads, -1, channels)

    def within(slot: Tensor) -> Tensor:
        """Slots of heads [b, g], counted from the beginning of each chunk, [w, 1]."""
        return (slot.flatten().index_select(0, work.head) - work.first_slot)[:, None]

    hidden = slots >= within(stop)
    if first is not None:
        hidden |= slots < within(first)
    if without is not None:
        hidden |= slots == within(without)
    at_once = max(1, _BYTES_AT_ONCE // (len(slots) * channels * query.element_size()))
    parts = []
    for head, block, unseen in zip(
        *(tensor.split(at_once) for tensor in (work.head, work.block, hidden[:, None])), strict=True
    ):
        of_block = None if also is None else also._replace(pages=pages_in(also.pages, block))
        copied = copy_pages(pages, pages_in(pages.table, block), of_block)
        key, value = (tensor.view(-1, len(slots), channels) for tensor in copied)
        scores = torch.bmm(grouped.index_select(0, head), key.transpose(1, 2)).float().mul_(scale)
        scores.masked_fill_(unseen, -torch.inf)
        peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        weights = scores.sub_(peak).exp_()
        parts.append((torch.bmm(weights.to(value.dtype), value).float(), weights.sum(-1), peak.squeeze(-1)))
    output, total, peak = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    merged = _merge(output, total, peak, work)
    return PagesAttended(merged.output.view(query.shape), merged.lse.view(query.shape[:-1]))


def attend_copied(
    query: Tensor,
    pages: Pages,
    owned: Tensor,
    copied: CopiedPages,
    new: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    also: Also | None = None,
) -> Tensor:
    """softmax(scale * query key^T) value over the slots of each head that `copied` shows, and over the key
    and value in `new`, both [b, g, d], if there are any. `query` [b, h, d] and the result; `owned` int32
    [b * g * columns]: the pages of each head; `also` has as many of the other layer, where the queries read
    two. Every head sees at least one key."""
    heads, channels = copied.place.shape[0], query.shape[-1]
    grouped = query.reshape(heads, 1, -1, channels)
    new = None if new is None else (new[0].reshape(heads, channels), new[1].reshape(heads, channels))
    at_once = max(1, _COPIED_AT_ONCE // (copied.slots * channels * query.element_size()))
    if heads <= at_once:
        return _attend_copies(grouped, pages, owned, copied, new, scale, also).reshape(query.shape)
    outputs, columns = [], len(owned) // heads
    for start in range(0, heads, at_once):
        part = slice(start, start + at_once)
        mask = None if copied.mask is None else copied.mask[part]
        of_part = CopiedPages(copied.slots, mask, copied.place[part] - start * copied.slots, copied.seen)
        new_part = None if new is None else (new[0][part], new[1][part])
        pages_part = slice(start * columns, (start + at_once) * columns)
        also_part = None if also is None else also._replace(pages=also.pages[pages_part])
        outputs.append(
            _attend_copies(grouped[part], pages, owned[pages_part], of_part, new_part, scale, also_part)
        )
    return torch.cat(outputs).reshape(query.shape)


def _attend_copies(
    query: Tensor,
    pages: Pages,
    owned: Tensor,
    copied: CopiedPages,
    new: tuple[Tensor, Tensor] | None,
    scale: float,
    also: Also | None,
) -> Tensor:
    """Of heads [n, 1, h / g, d]."""
    heads, channels = query.shape[0], query.shape[-1]
    # Of pages, [n * columns, slots of a page, d].
    key, value = copy_pages(pages, owned, also)
    if new is not None:
        key.view(-1, channels).index_copy_(0, copied.place, new[0])
        value.view(-1, channels).index_copy_(0, copied.place, new[1])
    key, value = (tensor.view(heads, 1, copied.slots, channels) for tensor in (key, value))
    first, count = copied.seen.start, copied.seen.stop - copied.seen.start
    if count < copied.slots:
        key, value = key.narrow(2, first, count), value.narrow(2, first, count)
    return scaled_dot_product_attention(query, key, value, attn_mask=copied.mask, scale=scale)


def _merge(output: Tensor, total: Tensor, peak: Tensor, work: Work) -> PagesAttended:
    """From chunks to heads. Of every chunk: the sum of exp(score - peak) value [w, h / g, d], that of
    exp(score - peak), and the peak [w, h / g]."""
    heads = len(work.bounds) - 1
    lowest = peak.new_full((heads, peak.shape[1]), torch.finfo(torch.float32).min)
    top = lowest.scatter_reduce_(0, work.head[:, None].expand_as(peak), peak, "amax")
    share = (peak - top.index_select(0, work.head)).exp_()
    sum_total = torch.zeros_like(top).index_add_(0, work.head, total * share)
    sum_output = output.new_zeros(heads, *output.shape[1:]).index_add_(
        0, work.head, output.mul_(share[..., None])
    )
    sum_output /= sum_total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return PagesAttended(sum_output, top + sum_total.log())


def join(attended: PagesAttended, score: Tensor, value: Tensor) -> Tensor:
    """The output float32 [b, h, d] of attention to one more key,
    with `score` float32 [b, h] and `value` [b, g, d]."""
    lse = torch.logaddexp(attended.lse, score)
    output = attended.output * (attended.lse - lse).exp()[..., None]
    share = (score - lse).exp().unflatten(1, (value.shape[1], -1))[..., None]
    return output + (share * value[:, :, None]).flatten(1, 2)
