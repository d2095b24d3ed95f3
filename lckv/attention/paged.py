"""Attention of one query per head to slots that lie in pages all over a pool, heads of any lengths.

The slots of every head are cut into chunks of whole pages. A list of all chunks that hold something is the work: each is attended by
itself, and what comes of a head's chunks is merged by the logsumexp of their scores. So the cost is that of the slots there are, not
of the longest head times the number of heads. `attend` chooses between the Triton kernel of `kernels.paged` and its twin here.

Shapes: b rows, h query heads, g KV heads, d channels, p pages of n slots, c pages of a chunk, w chunks in the list.
"""

import importlib.util
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SLOTS_OF_A_CHUNK = {"cpu": 64}
_SLOTS_OF_A_CHUNK_ELSEWHERE = 256
_BYTES_AT_ONCE = 2**20
"""Keys, and as many values, that the twin copies out of their pages at once: what stays in the cache of a CPU core is read back at
little cost."""


class Pages(NamedTuple):
    """What one layer keeps."""

    key: Tensor
    """[p, n, d]: the pool. Page 0 is owned by nobody; its slots, and those of owned pages that are not in use, are finite."""

    value: Tensor
    """[p, n, d]."""

    table: Tensor
    """int32 [table rows, multiple of c], contiguous: the pages of each head, in order of their slots; 0 where it owns none."""


class Work(NamedTuple):
    """Chunks to attend to, those of one head side by side; int64. A head is its row's number times g plus its number in the row."""

    head: Tensor
    """[w]: whose chunk it is."""

    first_slot: Tensor
    """[w]: the slot that it begins with."""

    block: Tensor
    """[w]: where its pages stand in the table, in units of c columns."""

    bounds: Tensor
    """[b * g + 1]: where each head's chunks begin in this list, and w at the end."""


class Attended(NamedTuple):
    """Attention to a part of the keys."""

    output: Tensor
    """float32 [b, h, d]; 0 where nothing is seen."""

    lse: Tensor
    """float32 [b, h]: logsumexp of the scores; -inf where nothing is seen."""


def pages_of_a_chunk(page_size: int, device_type: str) -> int:
    """c, for pages of n = `page_size` slots."""
    return max(1, _SLOTS_OF_A_CHUNK.get(device_type, _SLOTS_OF_A_CHUNK_ELSEWHERE) // page_size)


def list_work(
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
    table_row: NDArray[np.int64],
    *,
    page_size: int,
    columns: int,
    device: torch.device,
) -> Work:
    """The chunks that hold slots `first` .. `stop` - 1 of each head; all [b * g]. `table_row` is the head's row in a table of `columns`
    columns."""
    pages = pages_of_a_chunk(page_size, device.type)
    begin, end = first // (pages * page_size), -(-stop // (pages * page_size))
    counts = np.maximum(end - begin, 0)
    bounds = np.concatenate(([0], counts.cumsum()))
    head = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(bounds[-1]) - (bounds[:-1] - begin)[head]
    block = table_row[head] * (columns // pages) + chunk
    flat = torch.from_numpy(np.concatenate((head, chunk * (pages * page_size), block, bounds))).to(device)
    return Work(*flat.split((len(head), len(head), len(head), len(bounds))))


@cache
def why_not_kernel(device_type: str, dtype: torch.dtype) -> str | None:
    """What keeps the Triton kernel from serving such tensors; None if nothing does."""
    if device_type != "cuda":
        return f"the Triton kernel needs CUDA tensors, the model is on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel takes float32, bfloat16 and float16, not {dtype}"
    return None


def attend(query: Tensor, pages: Pages, work: Work, first: Tensor | None, stop: Tensor, *, scale: float) -> Attended:
    """softmax(scale * query key^T) value over slots first .. stop - 1 of each head; `query` [b, h, d], `first` (None: 0) and `stop`
    int64 [b, g]. `work` covers these slots; others that it covers are not seen. Softmax is float32."""
    if why_not_kernel(query.device.type, query.dtype) is None:
        from lckv.attention.kernels.paged import attend as fused

        return fused(query, pages, work, first, stop, scale=scale)
    return attend_in_torch(query, pages, work, first, stop, scale=scale)


def attend_in_torch(
    query: Tensor, pages: Pages, work: Work, first: Tensor | None, stop: Tensor, *, scale: float
) -> Attended:
    """Same contract as `attend`."""
    heads, channels = stop.numel(), query.shape[-1]
    page_size = pages.key.shape[1]
    count = pages_of_a_chunk(page_size, query.device.type)
    table, slots = pages.table.view(-1, count), torch.arange(count * page_size, device=query.device)
    grouped = query.reshape(heads, -1, channels)
    hidden = slots >= (stop.flatten().index_select(0, work.head) - work.first_slot)[:, None]
    if first is not None:
        hidden |= slots < (first.flatten().index_select(0, work.head) - work.first_slot)[:, None]
    at_once = max(1, _BYTES_AT_ONCE // (len(slots) * channels * query.element_size()))
    parts = []
    for start in range(0, max(1, len(work.head)), at_once):
        part = slice(start, start + at_once)
        owned = table.index_select(0, work.block[part]).flatten()
        key, value = (pool.index_select(0, owned).view(-1, len(slots), channels) for pool in pages[:2])
        scores = torch.bmm(grouped.index_select(0, work.head[part]), key.transpose(1, 2)).float().mul_(scale)
        scores.masked_fill_(hidden[part, None], -torch.inf)
        peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        weights = scores.sub_(peak).exp_()
        parts.append((torch.bmm(weights.to(value.dtype), value).float(), weights.sum(-1), peak.squeeze(-1)))
    output, total, peak = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    merged = _merge(output, total, peak, work)
    return Attended(merged.output.view(query.shape), merged.lse.view(query.shape[:-1]))


def _merge(output: Tensor, total: Tensor, peak: Tensor, work: Work) -> Attended:
    """From chunks to heads. Of every chunk: the sum of exp(score - peak) value [w, h / g, d], that of exp(score - peak), and the peak
    [w, h / g]."""
    heads = len(work.bounds) - 1
    lowest = peak.new_full((heads, peak.shape[1]), torch.finfo(torch.float32).min)
    top = lowest.scatter_reduce_(0, work.head[:, None].expand_as(peak), peak, "amax")
    share = (peak - top.index_select(0, work.head)).exp_()
    sum_total = torch.zeros_like(top).index_add_(0, work.head, total * share)
    sum_output = output.new_zeros(heads, *output.shape[1:]).index_add_(0, work.head, output.mul_(share[..., None]))
    sum_output /= sum_total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return Attended(sum_output, top + sum_total.log())


def join(attended: Attended, score: Tensor, value: Tensor) -> Tensor:
    """The output float32 [b, h, d] of attention to one more key, with `score` float32 [b, h] and `value` [b, g, d]."""
    lse = torch.logaddexp(attended.lse, score)
    output = attended.output * (attended.lse - lse).exp()[..., None]
    share = (score - lse).exp().unflatten(1, (value.shape[1], -1))[..., None]
    return output + (share * value[:, :, None]).flatten(1, 2)
