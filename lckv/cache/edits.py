"""What taking in new tokens does to the slots of a cache: the one rule that all caches follow.

Slots are tokens that are kept, in order. Appending writes behind them. A hidden token is dropped once a =
`KeyBias.age` tokens are behind it. So only the a newest slots can change, and afterwards they are the a
newest tokens again:

    a = 3      slots    0 1 2 3 4 5 6                 4 is hidden; two tokens come
                                [4 5 6]               the newest a
                                [5 6 7 8]             written from slot 4 on: 4 is gone, with three
                                                      tokens behind it

    a = 1      slots    0 1 2 3                       3 is merged into the token that comes
                              [3]
                              [4]                     its slot takes the place of slot 3; nothing is moved

Shapes: b rows, s new tokens, g KV heads, d channels of a head, e extra channels of the policy's keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.attention.unbiased import without_bias
from lckv.policies.base import Extension


class Edit(NamedTuple):
    """What is written where: some of the newest slots again, and the new tokens."""

    moved: int
    """m: so many of the newest slots are written again, in front of the new tokens."""

    slots: Tensor
    """int64 [m + s, b, g]: where each goes, if it is written."""

    written: Tensor | None
    """bool [m + s, b, g]; None: all."""

    lengths: Tensor
    """int64 [b, g]: slots afterwards."""


def edit_of(extension: Extension, key_bias: KeyBias | None, counted: Tensor | None, lengths: Tensor) -> Edit:
    """What `extension` does to heads with `lengths` [b, g] slots. `counted` is bool [b, s];
    None: no token is padding."""
    tokens = len(extension.key)
    kept = _kept_of_new(extension, key_bias, counted)
    if extension.hides is None or key_bias is None:
        return _write_from(lengths, kept, tokens)
    added = tokens if counted is None else counted.sum(1)[:, None]
    there = _newest(key_bias.age, lengths)
    place = torch.arange(key_bias.age, device=lengths.device)[:, None, None]
    dropped = extension.hides & (place < added) & (there >= 0)
    if key_bias.age == 1:
        return _write_from(lengths - dropped[0].long(), kept, tokens)
    if kept is None:
        kept = torch.ones(extension.key.shape[:3], dtype=torch.bool, device=lengths.device)
    kept = torch.cat(((there >= 0) & ~dropped, kept))
    return _write_from((lengths - key_bias.age).clamp(min=0), kept, len(kept))._replace(moved=key_bias.age)


def newest_slots(edit: Edit, lengths: Tensor) -> Tensor:
    """int64 [m, b, g]: the slots that `edit` moves, of heads with `lengths` [b, g]; 0 where there is none."""
    return _newest(edit.moved, lengths).clamp(min=0)


def stored_key(key: Tensor, key_bias: KeyBias | None) -> Tensor:
    """Keys [..., d + e] as a cache keeps them: [..., d], without bias."""
    return key if key_bias is None else without_bias(key, key_bias.extra_channels)


def _newest(count: int, lengths: Tensor) -> Tensor:
    """int64 [count, b, g]: the newest slots, the oldest first; negative where there are fewer."""
    return lengths - count + torch.arange(count, device=lengths.device)[:, None, None]


def _write_from(first: Tensor, kept: Tensor | None, tokens: int) -> Edit:
    """Write those that are kept one behind the other, from slot `first` [b, g] on."""
    if kept is None:
        places = torch.arange(tokens, device=first.device)[:, None, None]
        return Edit(0, first + places, None, first + tokens)
    return Edit(0, first + kept.cumsum(0) - 1, kept, first + kept.sum(0))


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
