"""What taking in new tokens does to the slots of a cache: the one rule that all caches follow.

Slots are tokens that are kept. A hidden token is dropped once a = `KeyBias.age` tokens are behind it. Where
a = 1, slots stand in order, and appending writes behind them:

    a = 1      slots    0 1 2 3                       3 is merged into the token that comes
                              [4]                     its slot takes the place of slot 3; nothing is moved

Where a > 1, the newest a tokens are a ring in front of the others (`lckv.attention.ring`), and each new one
takes the place of the one that has a behind it then. That one is written to the end, if it is not hidden:

    a = 3      tokens   6 4 5 | 0 2 3                 4 is hidden; two tokens come
                          [7 8]                       each in the place of the one three before it
                                      [5]             4 is gone, 5 is kept

So one token writes two slots at most. Of more than a new tokens the older ones go to the end at once.

Shapes: b rows, s new tokens, g KV heads, d channels of a head, e extra channels of the policy's keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.attention.ring import ring_size, ring_slot
from lckv.attention.unbiased import without_bias
from lckv.policies.base import Extension


class Edit(NamedTuple):
    """What is written where: some slots again, and the new tokens."""

    moved: Tensor | None
    """int64 [m, b, 1]: slots that are written again elsewhere, in front of the new tokens; None: none are."""

    slots: Tensor
    """int64 [m + s, b, g]: where each goes, if it is written."""

    written: Tensor | None
    """bool [m + s, b, g]; None: all."""

    lengths: Tensor
    """int64 [b, g]: slots afterwards."""


def edit_of(
    extension: Extension, key_bias: KeyBias | None, counted: Tensor | None, lengths: Tensor, seen: Tensor
) -> Edit:
    """What `extension` does to heads with `lengths` [b, g] slots, of rows with `seen` int64 [b] tokens.
    `counted` is bool [b, s]; None: no token is padding."""
    tokens = len(extension.key)
    kept = _kept_of_new(extension, key_bias, counted)
    if size := ring_size(key_bias):
        return _edit_of_ring(extension, size, counted, kept, lengths, seen[:, None])
    if extension.hides is None or key_bias is None:
        return _append(lengths, kept, tokens)
    dropped = extension.hides[0] & (lengths > 0)
    if counted is not None:
        dropped = dropped & counted.any(1)[:, None]
    return _append(lengths - dropped.long(), kept, tokens)


def stored_key(key: Tensor, key_bias: KeyBias | None) -> Tensor:
    """Keys [..., d + e] as a cache keeps them: [..., d], without bias."""
    return key if key_bias is None else without_bias(key, key_bias.extra_channels)


def _append(lengths: Tensor, kept: Tensor | None, tokens: int) -> Edit:
    """Write those that are kept one behind the other, from slot `lengths` [b, g] on."""
    if kept is None:
        places = torch.arange(tokens, device=lengths.device)[:, None, None]
        return Edit(None, lengths + places, None, lengths + tokens)
    return Edit(None, lengths + kept.cumsum(0) - 1, kept, lengths + kept.sum(0))


def _edit_of_ring(
    extension: Extension,
    size: int,
    counted: Tensor | None,
    kept: Tensor | None,
    lengths: Tensor,
    seen: Tensor,
) -> Edit:
    """`size`: a. `kept` bool [s, b, g] of the new tokens, None: all; `seen` [b, 1]."""
    tokens, heads = len(extension.key), lengths.shape[1]
    if kept is None:
        kept = torch.ones(extension.key.shape[:3], dtype=torch.bool, device=lengths.device)
    number = torch.arange(tokens, device=lengths.device)[:, None, None]
    ring, after = ring_slot(seen + number, size), seen + tokens
    # Token `seen` - a + i, if there is one, leaves the ring when new token i comes, into its slot.
    leaving = number[:size]
    leaves = (leaving >= size - seen).expand(-1, -1, heads)
    moved, in_front = ring[:size], number  # [m, b, 1]; of each new token, new ones in front of it
    if counted is not None:
        added = counted.sum(1)[:, None]
        leaves, after = leaves & (leaving < added), seen + added
        in_front = counted.transpose(0, 1)[..., None].cumsum(0) - 1
        ring = ring_slot(seen + in_front, size)
    if extension.hides is not None:
        leaves = leaves & ~extension.hides[: len(leaving)]
    # The last slot in use behind the ring, or of it.
    end = lengths.clamp(min=size) - 1
    to_end = end + leaves.cumsum(0)
    end, slots = to_end[-1], ring.expand_as(kept)
    if tokens > size:  # some new tokens are too old for the ring
        older = kept & (seen + in_front < after - size)
        slots = torch.where(older, end + older.cumsum(0), slots)
        end = end + older.sum(0)
    return Edit(
        moved,
        torch.cat((to_end, slots)),
        torch.cat((leaves, kept)),
        torch.minimum(after, end + 1),
    )


def _kept_of_new(extension: Extension, key_bias: KeyBias | None, counted: Tensor | None) -> Tensor | None:
    """bool [s, b, g]: new tokens that are neither padding nor dropped at once; None: all."""
    tokens, rows, heads, _ = extension.key.shape
    there = None if counted is None else counted.transpose(0, 1)
    kept = None if there is None else there[..., None].expand(tokens, rows, heads)
    if key_bias is None or tokens <= key_bias.age:
        return kept
    if there is None:
        behind = torch.arange(tokens - 1, -1, -1, device=extension.key.device)[:, None]
    else:
        behind = there.flip(0).cumsum(0).flip(0) - there.long()
    old_enough = (behind >= key_bias.age)[..., None]
    seen = ~((extension.key[..., -1] < HIDDEN / 2) & old_enough)
    return seen if kept is None else seen & kept
