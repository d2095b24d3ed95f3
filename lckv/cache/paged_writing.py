"""Where new tokens go in pages, and writing them there, on the device.

Shapes: b rows, s new tokens, g KV heads, d channels of a head,
l layers that compute keys and values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.cache.edits import Edit, edit_of, stored_key
from lckv.cache.paged_memory import PagedMemory
from lckv.policies.base import Extension


class Placed(NamedTuple):
    """New tokens of some layers, layers and rows in one dimension: l * b in the place of b."""

    layers: slice
    extension: Extension
    edit: Edit


def place(
    memory: PagedMemory, rows: Tensor, extensions: Sequence[Extension], counted: Tensor | None
) -> list[Placed]:
    """Where the new tokens of sequences `rows` int64 [b] go. One token per row: of all layers at once; more:
    layer by layer, which takes less memory."""
    tokens, key_bias = len(extensions[0].key), memory.policy.traits.key_bias
    parts = [extensions] if tokens == 1 else [[extension] for extension in extensions]
    placed: list[Placed] = []
    seen = memory.seen.index_select(0, rows)
    for part in parts:
        start = placed[-1].layers.stop if placed else 0
        layers, extension = slice(start, start + len(part)), together(part)
        before = memory.lengths[layers].index_select(1, rows).flatten(0, 1)
        repeated = None if counted is None else counted.repeat(len(part), 1)
        edit = edit_of(extension, key_bias, repeated, before, seen.repeat(len(part)))
        placed.append(Placed(layers, extension, edit))
    return placed


def write(memory: PagedMemory, begin: Tensor, part: Placed) -> None:
    """Write to the pages that the tables have by now. `begin` int64 [l, b, g]: where the rows' columns begin
    in the flattened table."""
    key_bias, written = memory.policy.traits.key_bias, part.edit.written
    # What is not written has no place, not even where the tables end.
    slots = part.edit.slots if written is None else part.edit.slots.where(written, 0)
    begin = begin[part.layers].flatten(0, 1)
    page, at = _places(memory, begin, slots)
    key, value = stored_key(part.extension.key, key_bias), part.extension.value
    if part.edit.moved is not None:
        old = _places(memory, begin, part.edit.moved)[1]
        key, value = (
            # [m * l * b * g, d] to [m, l * b, g, d], in front of [s, l * b, g, d]
            torch.cat((pool.flatten(0, 1)[old.flatten()].unflatten(0, old.shape), new))
            for pool, new in ((memory.pool.key, key), (memory.pool.value, value))
        )
    if written is not None or (memory.windowed and len(slots) > 1):
        # What is not kept, or has slid out of a window within these tokens, goes to page 0, which stays 0.
        page = page if written is None else page.where(written, 0)
        at = at.where(page > 0, 0)
        key, value = (tensor.masked_fill((page == 0)[..., None], 0) for tensor in (key, value))
    write_at(memory, at.flatten(), key, value)


def write_at(memory: PagedMemory, places: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys and values, one [d] for each of `places` int64 [n], which are counted in slots."""
    for pool, tensor in ((memory.pool.key, key), (memory.pool.value, value)):
        channels = pool.shape[-1]
        pool.view(-1, channels).index_copy_(0, places, tensor.reshape(-1, channels))


def together(layers: Sequence[Extension]) -> Extension:
    """Several layers' as one with more rows, those of the first layer first; without state."""
    if len(layers) == 1:
        return layers[0]._replace(state=None)
    # Of the newest tokens in the cache, so many are old enough to be dropped when these come.
    hides = [layer.hides[: len(layer.key)] for layer in layers if layer.hides is not None]
    return Extension(
        torch.cat([layer.key for layer in layers], 1),
        torch.cat([layer.value for layer in layers], 1),
        torch.cat(hides, 1) if hides else None,
    )


def _places(memory: PagedMemory, begin: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Pages of `slots` [n, l * b, g], 0 where there is none, and where the slots lie in the pool. `begin`
    [l * b, g]."""
    size = memory.page_size
    page = memory.tables.table.view(-1)[begin + slots // size].long()
    return page, page * size + slots % size
