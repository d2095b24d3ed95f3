"""A cache in one tensor per layer, for batches whose rows live equally long: what Hugging Face's `generate`
needs.

Every KV head of every row has slots of its own number; memory is as long as the longest. (Batches whose rows
come and go, and heads of very different lengths, are what the paged cache is for.)

Shapes: b rows, s new tokens, g KV heads, d channels of a head, n slots.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lckv.attention import past
from lckv.attention.key_bias import KeyBias
from lckv.attention.ring import ring_size
from lckv.attention.visibility import Visibility
from lckv.cache.base import KVCache
from lckv.cache.layer_slots import LayerSlots
from lckv.policies.base import Extension, KVPolicy
from lckv.sharing.mixing import Second


class ContiguousCache:
    """Implements `KVCache`. Made empty; the first commit decides rows, heads, dtype and device."""

    rope_length = None

    def __init__(self, layers: Iterable[int], policy: KVPolicy, windows: Mapping[int, int]) -> None:
        """`layers` compute keys and values. `windows` holds those of them that only windowed layers read,
        with the window in tokens: older tokens are dropped."""
        self._layers = {layer: LayerSlots(policy, windows.get(layer)) for layer in layers}
        self._in_order = ring_size(policy.traits.key_bias) == 0
        self._seen: Tensor | None = None
        self.columns = 0
        """Columns of the batch so far, padding included."""
        self.counted: Tensor | None = None
        """bool [b, columns]: those that were tokens; None: all."""

    @property
    def empty(self) -> bool:
        """Whether nothing was committed."""
        return self._seen is None

    @property
    def seen(self) -> Tensor:
        """int64 [b]; ValueError while the cache is empty."""
        if self._seen is None:
            raise ValueError("the cache is empty: it knows of no rows yet.")
        return self._seen

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        of_columns = 0 if self.counted is None else self.counted.numel()
        return of_columns + sum(layer.num_bytes for layer in self._layers.values())

    def lengths(self, layer: int) -> Tensor:
        """int64 [b, g]: slots in use of a layer that computes keys and values."""
        return self._layers[layer].past.lengths

    def state(self, layer: int) -> Tensor | None:
        """See `KVCache`."""
        return self._layers[layer].state

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
        columns: past.Columns | None = None,
    ) -> Tensor:
        """See `KVCache`. A window counts tokens, or with `columns` columns. What is held may be of another
        dtype than `query`, as where only some calls are under autocast."""
        tokens = past.NewTokens(
            new.key.permute(1, 2, 0, 3),
            new.value.permute(1, 2, 0, 3),
            counted,
            None if new.hides is None else new.hides.permute(1, 2, 0),
            seen=None if self._in_order else self._seen,
        )
        older = self._layers[layer].past
        if second is not None:
            older = older.with_second(self._layers[second.layer].past, second)
        attended = past.attend_past(
            query, tokens, older, visibility, scale=scale, key_bias=key_bias, columns=columns, places=places
        )
        return attended.to(query.dtype)

    def under(self, shown: Tensor | None) -> KVCache:
        """This cache as a batch of columns: new tokens see only those that are `shown` (bool [b, columns];
        None: all), and a window counts columns, padding included."""
        return (
            self if self.columns == 0 or (shown is None and self.counted is None) else _Columns(self, shown)
        )

    def columns_of(self, layer: int, shown: Tensor | None) -> past.Columns:
        """Where the slots of a layer stand among the columns of the batch; `shown` as in `under`."""
        column = self._layers[layer].tokens
        if self.counted is not None:
            order = torch.argsort(~self.counted, dim=1, stable=True)[:, None].expand(-1, column.shape[1], -1)
            column = order.gather(2, column.clamp(max=self.columns - 1))
        # Places beyond a head's length stand for nothing: any column will do.
        column = column.clamp(max=self.columns - 1)
        if shown is not None:
            shown = shown[:, None].expand(-1, column.shape[1], -1).gather(2, column)
        return past.Columns(self.columns - column, shown)

    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        """See `KVCache`. Raises ValueError unless there is exactly one extension
        for every layer of the cache."""
        if extensions.keys() != self._layers.keys():
            raise ValueError(
                f"the cache holds layers {sorted(self._layers)}; keys and values of {sorted(extensions)} "
                "came."
            )
        key = next(iter(extensions.values())).key
        if self._seen is None:
            self._seen = torch.zeros(key.shape[1], dtype=torch.int64, device=key.device)
        for layer, extension in extensions.items():
            self._layers[layer].write(extension, counted, self._seen)
        self._seen = self._seen + (len(key) if counted is None else counted.sum(1))
        if counted is not None or self.counted is not None:
            before, now = (
                torch.ones(key.shape[1], width, dtype=torch.bool, device=key.device)
                if known is None
                else known
                for known, width in ((self.counted, self.columns), (counted, len(key)))
            )
            self.counted = torch.cat((before, now), 1)
        self.columns += len(key)

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was (int64 [new b]): beam search, repetition, removal."""
        if self._seen is not None:
            self._seen = self._seen[index]
        if self.counted is not None:
            self.counted = self.counted[index]
        for layer in self._layers.values():
            layer.select_rows(index)

    def drop_newest(self, columns: int) -> None:
        """Forget the newest columns of every row, and the tokens in them. Raises ValueError, with nothing
        forgotten, where that is impossible: what was merged or dropped cannot come back."""
        if self._seen is None:
            return
        columns = min(columns, self.columns)
        kept = self.columns - columns
        tokens = (
            torch.full_like(self._seen, columns) if self.counted is None else self.counted[:, kept:].sum(1)
        )
        for number, layer in self._layers.items():
            if (obstacle := layer.why_not_drop(tokens)) is not None:
                raise ValueError(
                    f"the newest {columns} tokens cannot be forgotten: layer {number} {obstacle}."
                )
        for layer in self._layers.values():
            layer.drop_newest(tokens)
        self._seen = self._seen - tokens
        self.columns = kept
        if self.counted is not None:
            self.counted = self.counted[:, :kept]


class _Columns:
    """A `ContiguousCache` seen as the columns of a batch. Implements `KVCache`."""

    rope_length = None

    def __init__(self, cache: ContiguousCache, shown: Tensor | None) -> None:
        self._cache, self._shown = cache, shown
        self.state, self.commit = cache.state, cache.commit

    @property
    def empty(self) -> bool:
        """See `KVCache`."""
        return self._cache.empty

    @property
    def seen(self) -> Tensor:
        """See `KVCache`."""
        return self._cache.seen

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
        """See `KVCache`."""
        columns = None
        if self._shown is not None or visibility.window is not None:
            columns = self._cache.columns_of(layer, self._shown)
        return self._cache.attend(
            layer,
            query,
            new,
            counted,
            visibility,
            scale=scale,
            key_bias=key_bias,
            places=places,
            second=second,
            columns=columns,
        )
