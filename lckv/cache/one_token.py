"""Attention of one new token of each of some sequences, to slots where they lie in pages.

What there is to look at is decided on the host, from lengths of its own (`look`); attending asks the device
nothing.

Shapes: b rows, h query heads, g KV heads, d channels of a head, e extra channels of a policy's keys,
l layers that compute keys and values.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lckv.attention import paged
from lckv.attention.key_bias import KeyBias
from lckv.attention.pages import (
    Also,
    CopiedPages,
    PaddedWork,
    PagesAttended,
    Work,
    WorkOnHost,
    copy_evenly,
    list_work,
    work_on_host,
)
from lckv.attention.ring import ring_size, ring_slot
from lckv.attention.visibility import Visibility
from lckv.cache.edits import stored_key
from lckv.cache.page_tables import Integers
from lckv.cache.paged_memory import PagedMemory
from lckv.policies.base import Extension
from lckv.sharing.mixing import Second


class OneToken:
    """Of the sequences whose numbers are in `rows`."""

    def __init__(self, memory: PagedMemory, rows: Tensor, *, fixed: bool = False) -> None:
        """`rows` int64 [b]. `fixed`: `attend` calls the same operators on the same memory whatever `look` has
        seen, as long as `capacities` stay."""
        self._memory, self._rows, self._fixed = memory, rows, fixed
        # Of policies that keep every token all layers have equal lengths.
        self._alike = memory.policy.traits.keeps_every_token
        self._work: dict[tuple[int, int | None], Work] = {}
        self._padded: dict[tuple[int, int | None], PaddedWork] = {}
        self._copies: dict[tuple[int, int | None, bool], tuple[Sequence[Tensor], CopiedPages] | None] = {}
        self._lengths: Tensor | None = None
        self._ring_slot: Tensor | None = None
        self._no_kernel: bool | None = None  # of a model whose heads all have one size

    @property
    def lengths(self) -> Tensor:
        """int64 [l, b, g]: slots so far, on the device."""
        if self._lengths is None:
            self._lengths = self._memory.lengths.index_select(1, self._rows)
        return self._lengths

    @property
    def capacities(self) -> tuple[int, ...]:
        """Of the lists of work, where they are fixed."""
        return tuple(padded.capacity for padded in self._padded.values())

    def look(self, sequences: Integers, live: int | None = None) -> None:
        """See what `sequences` [b] hold now, the numbers that are in `rows`. Only the first `live` are looked
        at; the others stand for nothing."""
        tables = self._memory.tables
        self._sequences, self._host_lengths = sequences, tables.lengths[:, sequences]
        if live is not None:
            self._host_lengths[:, live:] = 0
        self._work.clear()
        self._copies.clear()
        for (number, window), padded in list(self._padded.items()):
            self._padded[number, window] = _filled(padded, self._listed(number, window), self._rows.device)
        self.forget()

    def forget(self) -> None:
        """Ask the device again for what it may have changed."""
        self._lengths = self._ring_slot = None

    def attend(
        self,
        number: int,
        query: Tensor,
        new: Extension,
        visibility: Visibility,
        scale: float,
        key_bias: KeyBias | None,
        second: Second | None = None,
    ) -> Tensor:
        """`query` [b, h, d + e] to the slots of layer `number`, or to what `second` makes of these and of
        another layer's, and to `new`; the result [b, h, d]."""
        channels = new.value.shape[-1]
        if self._no_kernel is None:
            self._no_kernel = paged.why_not_kernel_for(query, new.value) is not None
        query = query[..., :channels]
        size = ring_size(key_bias)
        without = self._leaving(new, size) if size and not visibility.exclude_self else None
        copy = (self._no_kernel or second is not None) and not self._fixed and (key_bias is None or size > 0)
        if copy and (copies := self._copies_of(number, visibility, query.dtype)) is not None:
            owned, copied = copies
            if without is not None:
                copied = copied.without(without, query.dtype)
            own = None if visibility.exclude_self else (stored_key(new.key[0], key_bias), new.value[0])
            also = self._also_copied(second, visibility, query.dtype)
            pages = self._memory.pages_of(number)
            return paged.attend_copied(query, pages, owned, copied, own, scale=scale, also=also)
        attended = self._attend_older(number, query, new, visibility, without, scale, second)
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
        without: Tensor | None,
        scale: float,
        second: Second | None,
    ) -> PagesAttended:
        """Attention of `query` [b, h, d] to the slots but `without`, int64 [b, g]."""
        stop, first = self.lengths[number], None
        also = None
        if second is not None:
            also = Also(self._memory.pages_of(self._memory.number[second.layer]).table, second)
        if visibility.window is not None:
            first = stop - (visibility.window - 1)
        if without is None and new.hides is not None and not visibility.exclude_self:
            stop = (stop - new.hides[0].long()).clamp(min=0)
        return paged.attend_paged(
            query,
            self._memory.pages_of(number),
            self._work_of(number, visibility.window),
            first,
            stop,
            without,
            scale=scale,
            also=also,
        )

    def _leaving(self, new: Extension, size: int) -> Tensor | None:
        """int64 [b, g]: the slot of the token that leaves a ring of `size` when `new` comes, if it is hidden
        from that, else -1; None: none is. Of the newest tokens it is the only one that is old enough, and
        where the query does not see itself, not even that one is."""
        if new.hides is None:
            return None
        if self._ring_slot is None:
            seen = self._memory.seen.index_select(0, self._rows)
            # Of rows that have not so many tokens, none leaves.
            self._ring_slot = ring_slot(seen, size).masked_fill(seen < size, -1)[:, None]
        return torch.where(new.hides[0], self._ring_slot, -1)

    def _work_of(self, number: int, window: int | None) -> Work:
        """The chunks that hold what one token per row may see of a layer."""
        name = 0 if self._alike else number, window
        if self._fixed:
            if name not in self._padded:
                self._padded[name] = _filled(None, self._listed(*name), self._rows.device)
            return self._padded[name].work
        if name not in self._work:
            memory = self._memory
            self._work[name] = list_work(
                *self._range(*name),
                self._table_rows(),
                page_size=memory.page_size,
                columns=memory.tables.table.shape[-1],
                device=self._rows.device,
            )
        return self._work[name]

    def _listed(self, number: int, window: int | None) -> WorkOnHost:
        return work_on_host(
            *self._range(number, window),
            self._table_rows(),
            page_size=self._memory.page_size,
            columns=self._memory.tables.table.shape[-1],
            device_type=self._rows.device.type,
        )

    def _range(self, number: int, window: int | None) -> tuple[Integers, Integers]:
        """First and last slots [b * g] that may be seen."""
        lengths = self._host_lengths[number].ravel()
        if window is None:
            return np.zeros_like(lengths), lengths
        return np.maximum(lengths - (window - 1), 0), lengths

    def _table_rows(self) -> Integers:
        """[b * g], of the table."""
        heads = self._host_lengths.shape[-1]
        return (self._sequences[:, None] * heads + np.arange(heads)).ravel()

    def _copies_of(
        self, number: int, visibility: Visibility, dtype: torch.dtype
    ) -> tuple[Tensor, CopiedPages] | None:
        """Pages int32 [b * g * columns] of a layer, and what one token per row sees of copies of them; None:
        see `copy_evenly`."""
        own = not visibility.exclude_self
        name = 0 if self._alike else number, visibility.window, own
        if name not in self._copies:
            seen = self._range(number, visibility.window)
            self._copies[name] = self._plan_copies(number, *seen, own, dtype)
        plan = self._copies[name]
        return None if plan is None else (plan[0][number if self._alike else 0], plan[1])

    def _also_copied(self, second: Second | None, visibility: Visibility, dtype: torch.dtype) -> Also | None:
        """The same pages of the other layer; as many, since it holds the same tokens."""
        if second is None:
            return None
        copies = self._copies_of(self._memory.number[second.layer], visibility, dtype)
        assert copies is not None, "two layers that are read together hold the same tokens"
        return Also(copies[0], second)

    def _plan_copies(
        self, number: int, first: Integers, stop: Integers, own: bool, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], CopiedPages] | None:
        """The same for all layers, where they are alike, else for one."""
        memory, device = self._memory, self._rows.device
        plan = copy_evenly(first, stop, own=own, page_size=memory.page_size, dtype=dtype, device=device)
        if plan is None:
            return None
        columns, copied = plan
        layers = slice(None) if self._alike else slice(number, number + 1)
        owned = memory.tables.pages_at(layers, self._sequences, columns)
        return torch.from_numpy(owned.reshape(len(owned), -1)).to(device).unbind(0), copied


def _filled(padded: PaddedWork | None, work: WorkOnHost, device: torch.device) -> PaddedWork:
    """`padded` with this work, or a larger one where it has no room."""
    count, heads = len(work.head), len(work.bounds) - 1
    if padded is None or padded.capacity < count:
        # A power of two, so that it is seldom replaced.
        capacity = 1 << (max(count, heads) - 1).bit_length()
        padded = PaddedWork(heads, capacity, device)
    padded.fill(work)
    return padded
