"""Some sequences of a paged cache, as the cache of a batch.

Shapes: b rows, s new tokens, h query heads, g KV heads, d channels of a head,
l layers that compute keys and values.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lckv.attention import paged, past
from lckv.attention.key_bias import KeyBias
from lckv.attention.pages import CopiedPages, PagesAttended, Work, copy_evenly, list_work
from lckv.attention.visibility import Visibility
from lckv.cache.edits import Edit, edit_of, newest_slots, stored_key
from lckv.cache.page_tables import Integers
from lckv.cache.paged_memory import PagedMemory
from lckv.cache.pool import OutOfPagesError
from lckv.policies.base import Extension

_BYTES_AT_ONCE = 2**27
"""Keys, and as many values, of earlier tokens that chunks of new tokens copy out of their pages at once, if
one row has not more."""


class _Placed(NamedTuple):
    """New tokens of some layers, layers and rows in one dimension: l * b in the place of b."""

    layers: slice
    extension: Extension

    before: Tensor
    """int64 [l * b, g]: slots so far."""

    edit: Edit


class PagedRows:
    """Implements `KVCache`; row i is `sequences[i]`. Valid while they are open."""

    def __init__(self, memory: PagedMemory, sequences: Integers) -> None:
        self._memory, self._sequences = memory, sequences
        self._key_bias = memory.policy.traits.key_bias
        self._rows, self._begin = (
            torch.from_numpy(array).to(memory.lengths.device)
            for array in (sequences, memory.tables.begin(sequences))
        )
        heads = memory.tables.lengths.shape[-1]
        self._table_rows = (sequences[:, None] * heads + np.arange(heads)).ravel()
        self._version = -1
        self._work: dict[tuple[bytes, int | None], Work] = {}
        self._copies: dict[tuple[bytes, int | None, bool], tuple[Tensor, CopiedPages] | None] = {}

    @property
    def empty(self) -> bool:
        """Whether no row has any token yet."""
        self._refresh()
        return self._empty

    @property
    def seen(self) -> Tensor:
        """int64 [b]."""
        return self._memory.seen.index_select(0, self._rows)

    @property
    def rope_length(self) -> int:
        """See `KVCache`: of the longest sequence that there can be, so that sequences can share keys."""
        return self._memory.max_tokens

    def state(self, layer: int) -> Tensor | None:
        """See `KVCache`."""
        if self._memory.state is None or self.empty:
            return None
        return self._memory.state[self._memory.number[layer]].index_select(1, self._rows)

    def attend(
        self,
        layer: int,
        query: Tensor,
        new: Extension,
        counted: Tensor | None,
        visibility: Visibility,
        *,
        scale: float,
        key_bias: KeyBias | None,
        places: Tensor | None = None,
    ) -> Tensor:
        """See `KVCache`. One token per row is attended where the slots lie;
        for more, their pages are copied together."""
        self._refresh()
        number = self._memory.number[layer]
        if len(new.key) == 1:
            return self._attend_one(number, query[:, :, 0], new, visibility, scale, key_bias)[:, :, None]
        key, value = (tensor.permute(1, 2, 0, 3) for tensor in (new.key, new.value))
        widest = int(self._columns.counts[number].max())
        row_bytes = max(1, widest) * self._memory.page_size * key[0, :, 0].numel() * key.element_size()
        step = max(1, _BYTES_AT_ONCE // row_bytes)
        outputs = []
        for start in range(0, len(query), step):
            rows = slice(start, start + step)
            fresh = past.NewTokens(
                key[rows],
                value[rows],
                None if counted is None else counted[rows],
                None if new.hides is None else new.hides[:, rows].permute(1, 2, 0),
            )
            older = self._gather(number, rows, widest)
            part = past.attend_past(
                query[rows],
                fresh,
                older,
                visibility,
                scale=scale,
                key_bias=key_bias,
                places=None if places is None else places[rows],
            )
            outputs.append(part)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @torch.no_grad()
    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        """See `KVCache`. Raises OutOfPagesError, and ValueError where a sequence becomes longer than the
        cache's `max_tokens` or there is not exactly one extension for each of its layers; the cache is then
        as it was."""
        memory = self._memory
        if extensions.keys() != memory.number.keys():
            raise ValueError(
                f"the cache holds layers {sorted(memory.number)}; keys and values of {sorted(extensions)} "
                "came."
            )
        placed = self._place([extensions[layer] for layer in memory.number], counted)
        lengths, added = self._on_host(placed, counted)
        longest = int((memory.tokens[self._sequences] + added).max())
        if longest > memory.max_tokens:
            raise ValueError(
                f"a sequence of {longest} tokens does not fit; max_tokens of the cache is "
                f"{memory.max_tokens}."
            )
        growth = memory.tables.growth(self._sequences, lengths)
        if growth.pages > memory.pool.free:
            raise OutOfPagesError(
                f"{int(added.sum())} more tokens in {len(added)} sequences need {growth.pages} pages, but "
                f"{memory.pool.free} of {memory.pool.pages} are free; close sequences, or make the cache "
                "with more pages."
            )
        memory.version += 1
        memory.tables.apply(growth)
        memory.tokens[self._sequences] += added
        tokens = len(placed[0].extension.key)
        memory.seen[self._rows] += tokens if counted is None else counted.sum(1)
        for part in placed:
            self._write(part)
            memory.lengths[part.layers, self._rows] = part.edit.lengths.unflatten(0, (-1, len(added)))
        if memory.state is not None:
            for layer, extension in extensions.items():
                assert extension.state is not None, "the policy keeps one of every token"
                memory.state[memory.number[layer]].index_copy_(1, self._rows, extension.state)

    def drop_newest(self, tokens: int) -> None:
        """Forget the newest tokens of every row; pages that are empty then are free. Raises ValueError, with
        nothing forgotten, where that is impossible: what was merged or dropped cannot come back."""
        memory = self._memory
        fewer = np.minimum(memory.tokens[self._sequences], tokens)
        lengths = memory.tables.lengths[:, self._sequences] - fewer[:, None]
        lost = memory.tables.loses(self._sequences, lengths)
        if not memory.policy.traits.keeps_every_token:
            obstacle = f"the KV policy {memory.policy.name} does not keep every token in a slot of its own"
        elif lost.any():
            number = next(layer for layer, place in memory.number.items() if lost[place])
            obstacle = f"layer {number} has a window and keeps no older ones, which would come back"
        else:
            memory.version += 1
            memory.tables.cut(self._sequences, lengths)
            memory.tokens[self._sequences] -= fewer
            taken = torch.from_numpy(fewer).to(memory.seen.device)
            memory.seen[self._rows] -= taken
            memory.lengths[:, self._rows] -= taken[:, None]
            return
        raise ValueError(f"the newest {tokens} tokens cannot be forgotten: {obstacle}.")

    def _refresh(self) -> None:
        """Look again at what the memory holds, if that has changed."""
        if self._version == self._memory.version:
            return
        self._version = self._memory.version
        self._empty = not self._memory.tokens[self._sequences].any()
        self._lengths = self._memory.lengths.index_select(1, self._rows)
        self._host_lengths = self._memory.tables.lengths[:, self._sequences]
        self._columns = self._memory.tables.owned(self._sequences)
        self._work.clear()
        self._copies.clear()

    def _attend_one(
        self,
        number: int,
        query: Tensor,
        new: Extension,
        visibility: Visibility,
        scale: float,
        key_bias: KeyBias | None,
    ) -> Tensor:
        """`query` [b, h, d + e], result [b, h, d]."""
        channels = new.value.shape[-1]
        if key_bias is None and paged.why_not_kernel_for(query, new.value) is not None:
            copies = self._copies_of(number, visibility, query.dtype)
            if copies is not None:
                own = None if visibility.exclude_self else (new.key[0], new.value[0])
                return paged.attend_copied(query, self._memory.pages_of(number), *copies, own, scale=scale)
        attended = self._attend_older(number, query[..., :channels], new, visibility, scale, key_bias)
        if visibility.exclude_self:
            return attended.output.to(query.dtype)
        if key_bias is not None and not key_bias.extra_channels:
            channels -= 1  # the last one is a bias, without which the newest key is seen
        own_key = new.key[0, :, :, None, :channels].float()
        grouped = query.unflatten(1, (own_key.shape[1], -1))[..., :channels].float()
        score = (grouped * own_key).sum(-1).flatten(1) * scale
        return paged.join(attended, score, new.value[0].float()).to(query.dtype)

    def _attend_older(
        self,
        number: int,
        query: Tensor,
        new: Extension,
        visibility: Visibility,
        scale: float,
        key_bias: KeyBias | None,
    ) -> PagesAttended:
        """Attention of `query` [b, h, d] to the slots.

        Of the a newest slots only the oldest one is so far behind the query that it may be hidden from it,
        and not even that one where the query does not see itself:

            a = 3      slots    0 1 2 3 4 5 6   query
                                o o o o h n n     Q           o, n: seen; h: not seen if it is hidden
        """
        stop, first = self._lengths[number], None
        attend = partial(paged.attend_paged, query, self._memory.pages_of(number), scale=scale)
        if visibility.window is not None:
            first = stop - (visibility.window - 1)
        if new.hides is None or key_bias is None or visibility.exclude_self:
            return attend(self._work_of(number, visibility.window), first, stop)
        after = (stop - (key_bias.age - 1)).clamp(min=0)
        older = attend(self._work_of(number, None), None, (after - new.hides[0].long()).clamp(min=0))
        if key_bias.age == 1:
            return older
        return paged.joined(older, attend(self._work_of(number, key_bias.age), after, stop))

    def _work_of(self, number: int, window: int | None) -> Work:
        """The chunks that hold what one token per row may see of a layer.
        Layers of equal lengths share them."""
        lengths = self._host_lengths[number].ravel()
        name = lengths.tobytes(), window
        if name not in self._work:
            first = np.zeros_like(lengths) if window is None else np.maximum(lengths - (window - 1), 0)
            self._work[name] = list_work(
                first,
                lengths,
                self._table_rows,
                page_size=self._memory.page_size,
                columns=self._memory.tables.table.shape[-1],
                device=self._rows.device,
            )
        return self._work[name]

    def _copies_of(
        self, number: int, visibility: Visibility, dtype: torch.dtype
    ) -> tuple[Tensor, CopiedPages] | None:
        """Pages int32 [b * g, columns] of a layer, and what one token per row sees of copies of them; None:
        see `copy_evenly`. Layers of equal lengths share the latter."""
        lengths, own = self._host_lengths[number].ravel(), not visibility.exclude_self
        name = lengths.tobytes(), visibility.window, own
        if name not in self._copies:
            first = np.zeros_like(lengths)
            if visibility.window is not None:
                first = np.maximum(lengths - (visibility.window - 1), 0)
            self._copies[name] = self._plan_copies(first, lengths, own, dtype)
        plan = self._copies[name]
        return None if plan is None else (plan[0][number], plan[1])

    def _plan_copies(
        self, first: Integers, stop: Integers, own: bool, dtype: torch.dtype
    ) -> tuple[Tensor, CopiedPages] | None:
        memory, device = self._memory, self._rows.device
        plan = copy_evenly(first, stop, own=own, page_size=memory.page_size, dtype=dtype, device=device)
        if plan is None:
            return None
        columns, copied = plan
        return torch.from_numpy(memory.tables.pages_at(self._sequences, columns)).to(device), copied

    def _gather(self, number: int, rows: slice, width: int) -> past.Past:
        """A copy of the slots of some rows, `width` pages of each head from the first one that it owns."""
        memory, table = self._memory, self._memory.tables.table[number]
        first = torch.from_numpy(self._columns.first[number, rows]).to(table.device)
        columns = (first[..., None] + torch.arange(width, device=table.device)).clamp(max=table.shape[-1] - 1)
        owned = table.index_select(0, self._rows[rows]).gather(2, columns)
        key, value = (
            pool.index_select(0, owned.flatten()).view(*first.shape, width * memory.page_size, pool.shape[-1])
            for pool in (memory.pool.key, memory.pool.value)
        )
        return past.Past(key, value, self._lengths[number, rows] - first * memory.page_size)

    def _place(self, extensions: Sequence[Extension], counted: Tensor | None) -> list[_Placed]:
        """Where new tokens go. One token per row: of all layers at once; more:
        layer by layer, which takes less memory."""
        tokens = len(extensions[0].key)
        parts = [extensions] if tokens == 1 else [[extension] for extension in extensions]
        placed: list[_Placed] = []
        for part in parts:
            start = placed[-1].layers.stop if placed else 0
            layers, extension = slice(start, start + len(part)), _together(part)
            before = self._memory.lengths[layers].index_select(1, self._rows).flatten(0, 1)
            repeated = None if counted is None else counted.repeat(len(part), 1)
            edit = edit_of(extension, self._key_bias, repeated, before)
            placed.append(_Placed(layers, extension, before, edit))
        return placed

    def _on_host(self, placed: Sequence[_Placed], counted: Tensor | None) -> tuple[Integers, Integers]:
        """Slots [l, b, g] afterwards, and new tokens [b]; asks the device at most once."""
        before, tokens = self._memory.tables.lengths[:, self._sequences], len(placed[0].extension.key)
        if counted is None and placed[0].edit.written is None and placed[0].extension.hides is None:
            return before + tokens, np.full(len(self._sequences), tokens)
        added = torch.full_like(self._rows, tokens) if counted is None else counted.sum(1)
        answer = torch.cat([*(part.edit.lengths.flatten() for part in placed), added]).cpu().numpy()
        return answer[: before.size].reshape(before.shape), answer[before.size :]

    def _write(self, part: _Placed) -> None:
        """Write to the pages that the tables have by now."""
        memory, written = self._memory, part.edit.written
        slots = part.edit.slots if written is None else part.edit.slots.clamp(min=0)
        page, place = self._places(part.layers, slots)
        key, value = stored_key(part.extension.key, self._key_bias), part.extension.value
        if part.edit.moved:
            old = self._places(part.layers, newest_slots(part.edit, part.before))[1]
            key, value = (
                # [m * l * b * g, d] to [m, l * b, g, d], in front of [s, l * b, g, d]
                torch.cat((pool.flatten(0, 1)[old.flatten()].unflatten(0, old.shape), new))
                for pool, new in ((memory.pool.key, key), (memory.pool.value, value))
            )
        if written is not None or (memory.windowed and len(slots) > 1):
            # What is not kept, or has slid out of a window within these tokens, goes to page 0, which stays
            # zeros.
            page = page if written is None else page.where(written, 0)
            place = place.where(page > 0, 0)
            key, value = (tensor.masked_fill((page == 0)[..., None], 0) for tensor in (key, value))
        for pool, tensor in ((memory.pool.key, key), (memory.pool.value, value)):
            pool.view(-1, pool.shape[-1]).index_copy_(0, place.flatten(), tensor.flatten(0, 2))

    def _places(self, layers: slice, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Pages of `slots` [n, l * b, g], 0 where there is none, and where the slots lie in the pool."""
        size = self._memory.page_size
        # [l, b, g] to [l * b, g]
        begin = self._begin[layers].flatten(0, 1)
        page = self._memory.tables.table.view(-1)[begin + slots // size].long()
        return page, page * size + slots % size


def _together(layers: Sequence[Extension]) -> Extension:
    """Several layers' as one with more rows, those of the first layer first; without state."""
    if len(layers) == 1:
        return layers[0]._replace(state=None)
    hides = [layer.hides for layer in layers if layer.hides is not None]
    return Extension(
        torch.cat([layer.key for layer in layers], 1),
        torch.cat([layer.value for layer in layers], 1),
        torch.cat(hides, 1) if hides else None,
    )
