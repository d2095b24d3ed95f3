"""A cache in one tensor per layer, for batches whose rows live equally long: what Hugging Face's `generate` needs.

Every KV head of every row has slots of its own number; memory is as long as the longest. (Batches whose rows come and go, and heads
of very different lengths, are what the paged cache is for.)

Shapes: b rows, s new tokens, g KV heads, d channels of a head, n slots.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lckv.attention import past
from lckv.attention.visibility import Visibility
from lckv.policies.base import Extension, KVPolicy

_FIRST_CAPACITY = 16


class ContiguousCache:
    """Implements `KVCache`. Made empty; the first commit decides rows, heads, dtype and device."""

    def __init__(self, layers: Iterable[int], policy: KVPolicy, windows: Mapping[int, int]) -> None:
        """`layers` compute keys and values. `windows` holds those of them that only windowed layers read, with the window in tokens:
        older tokens are dropped."""
        self._layers = {layer: _LayerSlots(policy, windows.get(layer)) for layer in layers}
        self._seen: Tensor | None = None

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
        return sum(layer.num_bytes for layer in self._layers.values())

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
        biased: bool,
    ) -> Tensor:
        """See `KVCache`."""
        tokens = past.NewTokens(new.key.permute(1, 2, 0, 3), new.value.permute(1, 2, 0, 3), counted, new.joins)
        return past.attend(query, tokens, self._layers[layer].past, visibility, scale=scale, biased=biased)

    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        """See `KVCache`. Raises ValueError unless there is exactly one extension for every layer of the cache."""
        if extensions.keys() != self._layers.keys():
            raise ValueError(f"the cache holds layers {sorted(self._layers)}; keys and values of {sorted(extensions)} came.")
        for layer, extension in extensions.items():
            self._layers[layer].write(extension, counted)
        key = next(iter(extensions.values())).key
        if self._seen is None:
            self._seen = torch.zeros(key.shape[1], dtype=torch.int64, device=key.device)
        self._seen = self._seen + (len(key) if counted is None else counted.sum(1))

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was (int64 [new b]): beam search, repetition, removal."""
        if self._seen is not None:
            self._seen = self._seen[index]
        for layer in self._layers.values():
            layer.select_rows(index)

    def drop_newest(self, tokens: int) -> None:
        """Forget the newest tokens of every row. Raises ValueError where that is impossible: merged tokens cannot be taken apart, and
        a window has dropped what would come back."""
        for number, layer in self._layers.items():
            layer.drop_newest(number, tokens)
        if self._seen is not None:
            self._seen = (self._seen - tokens).clamp(min=0)


class _LayerSlots:
    """The slots of one layer."""

    def __init__(self, policy: KVPolicy, window: int | None) -> None:
        self._policy, self._window = policy, window
        self._past: past.Past | None = None
        self._longest = 0  # an upper bound, so that lengths are fetched from the device only when they might matter
        self.state: Tensor | None = None

    @property
    def past(self) -> past.Past:
        assert self._past is not None, "read before the first commit"
        return self._past

    @property
    def num_bytes(self) -> int:
        tensors = [*(self._past or ()), *([] if self.state is None else [self.state])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def write(self, extension: Extension, counted: Tensor | None) -> None:
        """Write the whole slots among the new tokens; the first replaces the newest slot where it joins it."""
        tokens, rows, heads, channels = extension.key.shape
        if self._past is None:
            self._past = past.Past(
                *(extension.key.new_zeros(rows, heads, _FIRST_CAPACITY, channels) for _ in range(2)),
                torch.zeros(rows, heads, dtype=torch.int64, device=extension.key.device),
            )
        self._make_room(tokens)
        key, value, lengths = self._past
        written, slots = slots_of(extension, self._policy.whole(extension), counted, lengths)
        new_lengths = torch.where(written.any(0), slots.masked_fill(~written, -1).amax(0) + 1, lengths)
        token, row, head = written.nonzero(as_tuple=True)
        place = (row, head, slots[token, row, head])
        new_key = extension.key[token, row, head]
        if self._policy.biases_keys:
            new_key[:, -1] = 0
        key[place], value[place] = new_key, extension.value[token, row, head]
        self._past = past.Past(key, value, new_lengths)
        self.state = extension.state

    def select_rows(self, index: Tensor) -> None:
        if self._past is not None:
            self._past = past.Past(*(tensor[index] for tensor in self._past))
        if self.state is not None:
            self.state = self.state[:, index]

    def drop_newest(self, layer: int, tokens: int) -> None:
        if self.state is not None:
            raise ValueError(f"layer {layer} merges tokens; the newest {tokens} cannot be taken out of their slots again.")
        if self._past is None:
            return
        if self._window is not None and int(self._past.lengths.min()) - tokens < self._window - 1 < self._longest:
            raise ValueError(
                f"layer {layer} keeps a window of {self._window} tokens; the newest {tokens} cannot be forgotten, since those "
                "before them are gone."
            )
        self._past = self._past._replace(lengths=(self._past.lengths - tokens).clamp(min=0))

    def _make_room(self, tokens: int) -> None:
        assert self._past is not None
        self._longest += tokens
        if self._longest <= self._past.key.shape[2]:
            return
        if self._window is not None:
            self._drop_old(self._window - 1)
        self._longest = int(self._past.lengths.max()) + tokens
        capacity = self._past.key.shape[2]
        if self._longest > capacity:
            missing = max(self._longest, 2 * capacity) - capacity
            key, value = (torch.nn.functional.pad(tensor, (0, 0, 0, missing)) for tensor in self._past[:2])
            self._past = past.Past(key, value, self._past.lengths)

    def _drop_old(self, kept: int) -> None:
        """Move the newest `kept` tokens of each row to the front."""
        assert self._past is not None
        key, value, lengths = self._past
        shift = (lengths - kept).clamp(min=0)
        slots = torch.arange(key.shape[2], device=key.device)
        index = (slots + shift[..., None]).clamp(max=key.shape[2] - 1)[..., None].expand_as(key)
        self._past = past.Past(key.gather(2, index), value.gather(2, index), lengths - shift)


def slots_of(
    extension: Extension, whole: Tensor | None, counted: Tensor | None, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Which new tokens are written (bool [s, b, g]) and to which slot each goes (int64 [s, b, g], valid where written), with slots
    `lengths` [b, g] in use so far."""
    written = torch.ones(extension.key.shape[:3], dtype=torch.bool, device=lengths.device) if whole is None else whole
    if counted is not None:
        written = written & counted.transpose(0, 1)[..., None]
    first = lengths if extension.joins is None else lengths - extension.joins.long()
    return written, first + written.cumsum(0) - 1
