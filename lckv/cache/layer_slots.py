"""The slots of one layer in a contiguous cache: one tensor each for keys and values, which grows.

Shapes: b rows, s new tokens, g KV heads, d channels of a head, n slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention import past
from lckv.cache.edits import edit_of, stored_key
from lckv.policies.base import Extension, KVPolicy

_REVOCABLE = 32
"""So many of the newest tokens can always be forgotten again:
windowed layers keep as many tokens beyond their window."""


class _Memory(NamedTuple):
    """As `past.Past`, with more slots than are in use: one more than there is room for, where tokens go that
    are not written."""

    key: Tensor
    value: Tensor
    lengths: Tensor


class LayerSlots:
    """Memory for the slots of one layer, and how many of them each head uses."""

    def __init__(self, policy: KVPolicy, window: int | None) -> None:
        self._traits, self._window = policy.traits, window
        self._slots: _Memory | None = None
        # An upper bound, so that lengths are fetched from the device only when they might matter; the length
        # of every head while these are even.
        self._longest, self._even = 0, policy.traits.keeps_every_token
        self._gone: Tensor | None = None  # int64 [b, g]: tokens that the window has dropped
        self.state: Tensor | None = None
        """What the KV policy keeps besides slots."""

    @property
    def past(self) -> past.Past:
        """What is in use, and what might be."""
        assert self._slots is not None, "read before the first commit"
        key, value, lengths = self._slots
        used, behind = self._longest, self._longest + 1
        spare = (key[:, :, :behind], value[:, :, :behind]) if self._even else None
        return past.Past(key[:, :, :used], value[:, :, :used], lengths, self._even, spare)

    @property
    def tokens(self) -> Tensor:
        """int64 [b, g, n]: the how-manieth token of its row each slot of `past` holds."""
        assert self._slots is not None, "read before the first commit"
        slots = torch.arange(self._longest, device=self._slots.lengths.device)
        slots = slots.expand(*self._slots.lengths.shape, -1)
        return slots if self._gone is None else slots + self._gone[..., None]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        tensors = (*(self._slots or ()), self._gone, self.state)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def write(self, extension: Extension, counted: Tensor | None, seen: Tensor) -> None:
        """Take in new tokens of rows that have `seen` int64 [b], and drop what is hidden."""
        key, value = stored_key(extension.key.detach(), self._traits.key_bias), extension.value.detach()
        tokens, rows, heads, channels = value.shape
        if self._slots is None:
            empty = value.new_zeros(rows, heads, 1, channels)
            lengths = torch.zeros(rows, heads, dtype=torch.int64, device=key.device)
            self._slots = _Memory(empty.to(key.dtype), empty.clone(), lengths)
        self.state = None if extension.state is None else extension.state.detach()
        self._even = self._even and counted is None
        if self._even:
            self._append(key, value)
            return
        lengths = self._slots.lengths
        edit = edit_of(extension, self._traits.key_bias, counted, lengths, seen)
        slots, written = edit.slots, edit.written
        shift = self._make_room(tokens, edit.lengths)
        if shift is not None:
            slots = slots - shift
            written = slots >= 0 if written is None else written & (slots >= 0)
        if written is not None:
            slots = slots.masked_fill(~written, self._slots.key.shape[2] - 1)
        row, head = (torch.arange(number, device=key.device) for number in (rows, heads))
        for memory, new in ((self._slots.key, key), (self._slots.value, value)):
            if edit.moved is not None:
                moved = edit.moved.clamp(max=memory.shape[2] - 1)  # rows may have fewer slots than others
                new = torch.cat((memory[row[:, None], head, moved], new))
            memory[row[:, None], head, slots] = new.to(memory.dtype)

    def _append(self, key: Tensor, value: Tensor) -> None:
        """The new tokens [s, b, g, d] of heads that stay even."""
        assert self._slots is not None
        self._make_room(len(key), self._slots.lengths + len(key))
        written = min(len(key), self._longest)  # a window may be shorter
        for memory, new in ((self._slots.key, key), (self._slots.value, value)):
            memory[:, :, self._longest - written : self._longest] = new[-written:].permute(1, 2, 0, 3)

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was."""
        if self._slots is not None:
            self._slots = _Memory(*(tensor[index] for tensor in self._slots))
        if self._gone is not None:
            self._gone = self._gone[index]
        if self.state is not None:
            self.state = self.state[:, index]

    def why_not_drop(self, tokens: Tensor) -> str | None:
        """What keeps the newest `tokens` (int64 [b]) from being forgotten; None if nothing does."""
        if not self._traits.keeps_every_token:
            return (
                "does not keep every token in a slot of its own; what was merged or dropped cannot come back"
            )
        if self._gone is not None and self._slots is not None and self._window is not None:
            missing = (self._gone > 0) & (self._slots.lengths - tokens[:, None] < self._window - 1)
            if bool(missing.any()):
                return f"has a window of {self._window} tokens and keeps no older ones, which would come back"
        return None

    def drop_newest(self, tokens: Tensor) -> None:
        """Forget the newest `tokens` (int64 [b]) of each row."""
        if self._slots is not None:
            lengths = (self._slots.lengths - tokens[:, None]).clamp(min=0)
            self._slots, self._even = self._slots._replace(lengths=lengths), False

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


def _without_oldest(slots: _Memory, shift: Tensor) -> _Memory:
    """The same without the first `shift` [b, g] of each head's slots."""
    key, value, lengths = slots
    places = torch.arange(key.shape[2], device=key.device)
    index = (places + shift[..., None]).clamp(max=key.shape[2] - 1)[..., None].expand_as(key)
    return _Memory(key.gather(2, index), value.gather(2, index), lengths - shift)
