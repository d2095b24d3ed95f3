"""A cache in one tensor per layer, for batches whose rows live equally long: what Hugging Face's `generate`
needs.

Every KV head of every row has slots of its own number; memory is as long as the longest. (Batches whose rows
come and go, and heads of very different lengths, are what the paged cache is for.)

Shapes: b rows, s new tokens, g KV heads, d channels of a head, n slots.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention import past
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv.cache.edits import edit_of, newest_slots, stored_key
from lckv.policies.base import Extension, KVPolicy

_REVOCABLE = 32
"""So many of the newest tokens can always be forgotten again:
windowed layers keep as many tokens beyond their window."""


class ContiguousCache:
    """Implements `KVCache`. Made empty; the first commit decides rows, heads, dtype and device."""

    def __init__(self, layers: Iterable[int], policy: KVPolicy, windows: Mapping[int, int]) -> None:
        """`layers` compute keys and values. `windows` holds those of them that only windowed layers read,
        with the window in tokens: older tokens are dropped."""
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
        key_bias: KeyBias | None,
    ) -> Tensor:
        """See `KVCache`."""
        tokens = past.NewTokens(
            new.key.permute(1, 2, 0, 3),
            new.value.permute(1, 2, 0, 3),
            counted,
            None if new.hides is None else new.hides.permute(1, 2, 0),
        )
        return past.attend_past(
            query, tokens, self._layers[layer].past, visibility, scale=scale, key_bias=key_bias
        )

    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        """See `KVCache`. Raises ValueError unless there is exactly one extension
        for every layer of the cache."""
        if extensions.keys() != self._layers.keys():
            raise ValueError(
                f"the cache holds layers {sorted(self._layers)}; keys and values of {sorted(extensions)} "
                "came."
            )
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
        """Forget the newest tokens of every row. Raises ValueError, with nothing forgotten, where that is
        impossible: what was merged or dropped cannot come back."""
        for number, layer in self._layers.items():
            if (obstacle := layer.why_not_drop(tokens)) is not None:
                raise ValueError(
                    f"the newest {tokens} tokens cannot be forgotten: layer {number} {obstacle}."
                )
        for layer in self._layers.values():
            layer.drop_newest(tokens)
        if self._seen is not None:
            self._seen = (self._seen - tokens).clamp(min=0)


class _LayerSlots:
    """The slots of one layer."""

    def __init__(self, policy: KVPolicy, window: int | None) -> None:
        self._traits, self._window = policy.traits, window
        # One slot more than room for: where tokens go that are not written.
        self._slots: past.Past | None = None
        # An upper bound, so that lengths are fetched from the device only when they might matter.
        self._longest = 0
        self._gone: Tensor | None = None  # int64 [b, g]: tokens that the window has dropped
        self.state: Tensor | None = None

    @property
    def past(self) -> past.Past:
        """What is in use, and what might be."""
        assert self._slots is not None, "read before the first commit"
        key, value, lengths = self._slots
        return past.Past(key[:, :, : self._longest], value[:, :, : self._longest], lengths)

    @property
    def num_bytes(self) -> int:
        tensors = (*(self._slots or ()), self._gone, self.state)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def write(self, extension: Extension, counted: Tensor | None) -> None:
        """Append the new tokens, and drop what is hidden."""
        key, value = stored_key(extension.key.detach(), self._traits.key_bias), extension.value.detach()
        tokens, rows, heads, channels = value.shape
        if self._slots is None:
            empty = value.new_zeros(rows, heads, 1, channels)
            lengths = torch.zeros(rows, heads, dtype=torch.int64, device=key.device)
            self._slots = past.Past(empty.to(key.dtype), empty.clone(), lengths)
        lengths = self._slots.lengths
        edit = edit_of(extension, self._traits.key_bias, counted, lengths)
        slots, written = edit.slots, edit.written
        shift = self._make_room(tokens, edit.lengths)
        if shift is not None:
            slots = slots - shift
            written = slots >= 0 if written is None else written & (slots >= 0)
        if written is not None:
            slots = slots.masked_fill(~written, self._slots.key.shape[2] - 1)
        row, head = (torch.arange(number, device=key.device) for number in (rows, heads))
        for memory, new in ((self._slots.key, key), (self._slots.value, value)):
            if edit.moved:
                new = torch.cat((memory[row[:, None], head, newest_slots(edit, lengths)], new))
            memory[row[:, None], head, slots] = new
        self.state = None if extension.state is None else extension.state.detach()

    def select_rows(self, index: Tensor) -> None:
        if self._slots is not None:
            self._slots = past.Past(*(tensor[index] for tensor in self._slots))
        if self._gone is not None:
            self._gone = self._gone[index]
        if self.state is not None:
            self.state = self.state[:, index]

    def why_not_drop(self, tokens: int) -> str | None:
        if not self._traits.keeps_every_token:
            return (
                "does not keep every token in a slot of its own; what was merged or dropped cannot come back"
            )
        if self._gone is not None and self._slots is not None and self._window is not None:
            missing = (self._gone > 0) & (self._slots.lengths - tokens < self._window - 1)
            if bool(missing.any()):
                return f"has a window of {self._window} tokens and keeps no older ones, which would come back"
        return None

    def drop_newest(self, tokens: int) -> None:
        if self._slots is not None:
            self._slots = self._slots._replace(lengths=(self._slots.lengths - tokens).clamp(min=0))

    def _make_room(self, tokens: int, lengths: Tensor) -> Tensor | None:
        """For up to `tokens` more slots per head, after which there are `lengths` [b, g]. Returns how many of
        the oldest of these were dropped, [b, g]; None: none were."""
        assert self._slots is not None
        self._slots = self._slots._replace(lengths=lengths)
        self._longest += tokens
        room = self._slots.key.shape[2] - 1
        if self._longest <= room:
            return None
        if self._window is None:
            self._longest = int(lengths.max())
            if self._longest > room:
                self._grow(max(self._longest, 2 * room))
            return None
        kept = self._window - 1 + _REVOCABLE
        shift = (lengths - kept).clamp(min=0)
        self._gone = shift if self._gone is None else self._gone + shift
        self._slots = _without_oldest(self._slots, shift)
        self._longest = int(self._slots.lengths.max())
        # In the end there is room for so many more that tokens are moved once in a quarter of a window.
        self._grow(min(max(self._longest, 2 * room), kept + _REVOCABLE + self._window // 4))
        return shift

    def _grow(self, room: int) -> None:
        assert self._slots is not None
        missing = room + 1 - self._slots.key.shape[2]
        if missing > 0:
            key, value = (pad(tensor, (0, 0, 0, missing)) for tensor in self._slots[:2])
            self._slots = self._slots._replace(key=key, value=value)


def _without_oldest(slots: past.Past, shift: Tensor) -> past.Past:
    """The same without the first `shift` [b, g] of each head's slots."""
    key, value, lengths = slots
    places = torch.arange(key.shape[2], device=key.device)
    index = (places + shift[..., None]).clamp(max=key.shape[2] - 1)[..., None].expand_as(key)
    return past.Past(key.gather(2, index), value.gather(2, index), lengths - shift)
