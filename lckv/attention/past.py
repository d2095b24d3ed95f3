"""Attention of new tokens to themselves and to what a cache holds of earlier ones.

Queries are walked in blocks, so nothing of size (new tokens) x (all tokens) is made. It is what decoding and continued prompts use;
a prompt without a past is ordinary attention (`backends.py`).

Shapes: b rows, h query heads, g KV heads, s new tokens, n slots, d channels of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lckv.attention.visibility import Visibility

_BLOCK = 128
"""Queries per block, at most."""

_SCORES = 2**25
"""Entries of the score matrix of a block, at most: b x h x queries x (n + s)."""


class Past(NamedTuple):
    """What a cache holds of one layer."""

    key: Tensor
    """[b, g, n, d], rotated; entries beyond a head's length are finite."""

    value: Tensor
    """[b, g, n, d]."""

    lengths: Tensor
    """int64 [b, g]: slots in use, the first ones. Under a window slots are tokens, the newest last."""


class NewTokens(NamedTuple):
    """Keys and values that are not in the cache yet."""

    key: Tensor
    """[b, g, s, d]."""

    value: Tensor
    """[b, g, s, d]."""

    counted: Tensor | None
    """bool [b, s]: those that are not padding; None: all. In each row they lie side by side."""

    joins: Tensor | None
    """bool [b, g]: the first one replaces the newest slot of the past; None: never."""


def attend(
    query: Tensor, new: NewTokens, past: Past, visibility: Visibility, *, scale: float, biased: bool = False
) -> Tensor:
    """softmax(scale * query key^T) value over the visible keys, 0 for a query that sees none; query and result [b, h, s, d].

    `visibility` (without documents) and `biased` as in `reference.attend`; keys of the past have no bias. Scores are float32: rounded to
    bfloat16 they would be off by 0.4 %, which an exponential makes more of.
    """
    per_query = query.shape[0] * query.shape[1] * (past.key.shape[2] + new.key.shape[2])
    size = min(_BLOCK, max(1, _SCORES // max(1, per_query)))
    with torch.autocast(query.device.type, enabled=False):
        new = new._replace(key=new.key.float(), value=new.value.to(past.value.dtype))
        past = past._replace(key=past.key.float())
        heads = query.float().unflatten(1, (new.key.shape[1], -1))
        blocks = [
            _attend_block(part, start, new, past, visibility, scale, biased)
            for start, part in zip(range(0, query.shape[2], size), heads.split(size, 3), strict=True)
        ]
    return torch.cat(blocks, 3).flatten(1, 2)


def _attend_block(
    query: Tensor, start: int, new: NewTokens, past: Past, visibility: Visibility, scale: float, biased: bool
) -> Tensor:
    """Queries start .. of [b, g, h / g, q, d]; queries and keys are float32, the result is of the values' dtype."""
    channels = query.shape[-1] - biased
    queries = torch.arange(start, start + query.shape[3], device=query.device)
    behind = int(visibility.exclude_self)
    old = _scores(query, past.key, channels, scale)
    seen_old = _visible_past(queries, new, past, visibility)[:, :, None]
    # The newest new key that any of these queries may see comes last.
    width = start + query.shape[3] - behind
    if past.key.shape[2] + width == 0:
        return torch.zeros_like(query, dtype=new.value.dtype)
    key, value = new.key[:, :, :width], new.value[:, :, :width]
    fresh = _scores(query, key, channels, scale)
    if biased:
        fresh = fresh + _bias(key, queries, behind)[:, :, None]
    seen_new = _visible_new(queries, width, new.counted, visibility)
    scores = torch.cat((old.masked_fill(~seen_old, -torch.inf), fresh.masked_fill(~seen_new, -torch.inf)), -1)
    peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - peak).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    of_old, of_new = weights.to(value.dtype).split((old.shape[-1], width), -1)
    return _mix(of_old, past.value) + _mix(of_new, value)


def _scores(query: Tensor, key: Tensor, channels: int, scale: float) -> Tensor:
    """[b, g, h / g, q, keys] over the first `channels` channels."""
    rows = query[..., :channels].flatten(2, 3) @ key[..., :channels].transpose(-1, -2)
    return rows.unflatten(2, query.shape[2:4]) * scale


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    return (weights.flatten(2, 3) @ value).unflatten(2, weights.shape[2:4])


def _bias(key: Tensor, queries: Tensor, behind: int) -> Tensor:
    """[b, g, q, keys]: channel d - 1 of the keys, except at each query's frontier."""
    keys = torch.arange(key.shape[2], device=key.device)
    frontier = keys == queries[:, None] - behind
    return key[:, :, None, :, -1].masked_fill(frontier, 0.0)


def _visible_new(queries: Tensor, width: int, counted: Tensor | None, visibility: Visibility) -> Tensor:
    """bool, broadcasts to [b, g, h / g, q, width]."""
    keys = torch.arange(width, device=queries.device)
    distance = queries[:, None] - keys
    seen = distance >= int(visibility.exclude_self)
    if visibility.window is not None:
        seen = seen & (distance < visibility.window)
    if counted is None:
        return seen
    return seen & counted[:, None, None, None, :width]


def _visible_past(queries: Tensor, new: NewTokens, past: Past, visibility: Visibility) -> Tensor:
    """bool [b, g, q or 1, n]."""
    slots = torch.arange(past.key.shape[2], device=queries.device)
    lengths = past.lengths[:, :, None, None]
    seen = slots < lengths
    # Counted tokens between the past and each query.
    ahead = queries[None] if new.counted is None else (new.counted.cumsum(1) - new.counted.long())[:, queries]
    if visibility.window is not None:
        seen = seen & (lengths - slots + ahead[:, None, :, None] < visibility.window)
    if new.joins is not None:
        hidden = new.joins[:, :, None, None] & (slots == lengths - 1)
        seen = seen & ~(hidden & (ahead >= int(visibility.exclude_self))[:, None, :, None])
    return seen
