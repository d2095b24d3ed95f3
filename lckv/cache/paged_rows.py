"""Some sequences of a paged cache, as the cache of a batch.

Shapes: b rows, s new tokens, h query heads, g KV heads, d channels of a head,
l layers that compute keys and values.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lckv.attention import past
from lckv.attention.key_bias import KeyBias
from lckv.attention.pages import Also, copy_pages
from lckv.attention.ring import ring_size
from lckv.attention.visibility import Visibility
from lckv.cache.one_token import OneToken
from lckv.cache.page_tables import Integers
from lckv.cache.paged_memory import PagedMemory
from lckv.cache.paged_writing import Placed, place, write
from lckv.cache.pool import OutOfPagesError
from lckv.policies.base import Extension
from lckv.sharing.mixing import Second

_BYTES_AT_ONCE = 2**27
"""Keys, and as many values, of earlier tokens that chunks of new tokens copy out of their pages at once, if
one row has not more."""


class PagedRows:
    """Implements `KVCache`; row i is `sequences[i]`. Valid while they are open."""

    def __init__(self, memory: PagedMemory, sequences: Integers) -> None:
        self._memory, self._sequences = memory, sequences
        self._rows, self._begin = (
            torch.from_numpy(array).to(memory.lengths.device)
            for array in (sequences, memory.tables.begin(sequences))
        )
        self._one = OneToken(memory, self._rows)
        self._in_order = ring_size(memory.policy.traits.key_bias) == 0
        self._version = -1

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
        second: Second | None = None,
    ) -> Tensor:
        """See `KVCache`. One token per row is attended where the slots lie;
        for more, their pages are copied together."""
        self._refresh()
        number = self._memory.number[layer]
        if len(new.key) == 1:
            one = self._one.attend(number, query[:, :, 0], new, visibility, scale, key_bias, second)
            return one[:, :, None]
        key, value = (tensor.permute(1, 2, 0, 3) for tensor in (new.key, new.value))
        widest = int(self._columns.counts[number].max())
        row_bytes = max(1, widest) * self._memory.page_size * key[0, :, 0].numel() * key.element_size()
        step = max(1, _BYTES_AT_ONCE // row_bytes)
        outputs, seen = [], None if self._in_order else self.seen
        for start in range(0, len(query), step):
            rows = slice(start, start + step)
            fresh = past.NewTokens(
                key[rows],
                value[rows],
                None if counted is None else counted[rows],
                None if new.hides is None else new.hides[:, rows].permute(1, 2, 0),
                seen=None if seen is None else seen[rows],
            )
            older = self._gather(number, rows, widest, second)
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
        placed = place(memory, self._rows, [extensions[layer] for layer in memory.number], counted)
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
            write(memory, self._begin, part)
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
        self._columns = self._memory.tables.owned(self._sequences)
        self._one.look(self._sequences)

    def _gather(self, number: int, rows: slice, width: int, second: Second | None) -> past.Past:
        """A copy of the slots of some rows, `width` pages of each head from the first one that it owns; with
        `second` what is read of that layer and another one."""
        memory, tables = self._memory, self._memory.tables.table
        first = torch.from_numpy(self._columns.first[number, rows]).to(tables.device)
        columns = (first[..., None] + torch.arange(width, device=tables.device)).clamp(
            max=tables.shape[-1] - 1
        )

        def owned(layer: int) -> Tensor:
            return tables[layer].index_select(0, self._rows[rows]).gather(2, columns).flatten()

        also = None if second is None else Also(owned(memory.number[second.layer]), second)
        key, value = (
            tensor.view(*first.shape, width * memory.page_size, tensor.shape[-1])
            for tensor in copy_pages(memory.pages_of(number), owned(number), also)
        )
        return past.Past(key, value, self._one.lengths[number, rows] - first * memory.page_size)

    def _on_host(self, placed: Sequence[Placed], counted: Tensor | None) -> tuple[Integers, Integers]:
        """Slots [l, b, g] afterwards, and new tokens [b]; asks the device at most once."""
        before, tokens = self._memory.tables.lengths[:, self._sequences], len(placed[0].extension.key)
        if counted is None and placed[0].edit.written is None and placed[0].extension.hides is None:
            return before + tokens, np.full(len(self._sequences), tokens)
        added = torch.full_like(self._rows, tokens) if counted is None else counted.sum(1)
        answer = torch.cat([*(part.edit.lengths.flatten() for part in placed), added]).cpu().numpy()
        return answer[: before.size].reshape(before.shape), answer[before.size :]
