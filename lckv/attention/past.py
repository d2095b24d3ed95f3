"""Attention of new tokens to themselves and to what a cache holds of earlier ones.

Queries are walked in blocks, so nothing of size (new tokens) x (all tokens) is made. It is what decoding and
continued prompts use; a prompt without a past is ordinary attention (`backends.py`).

Shapes: b rows, h query heads, g KV heads, s new tokens, n slots, d channels of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility

_BLOCK = 128
"""Queries per block, at most."""

_MASK = 2**24
"""Entries of the mask of a block, at most: b x g x queries x (n + s)."""


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
    query: Tensor,
    new: NewTokens,
    past: Past,
    visibility: Visibility,
    *,
    scale: float,
    key_bias: KeyBias | None = None,
) -> Tensor:
    """softmax(scale * query key^T) value over the visible keys, 0 for a query that sees none; query [b, h, s,
    d], result the same in the dtype of the values.

    `visibility` (without documents) and `biased` as in `reference.attend`; keys of the past have no bias.
    Scores are float32.
    """
    rows, kv_heads, older, _ = past.key.shape
    size = min(_BLOCK, max(1, _MASK // max(1, rows * kv_heads * (older + new.key.shape[2]))))
    if key_bias is not None:  # what a key's last channel says is said by the mask
        query = torch.cat((query[..., :-1], torch.zeros_like(query[..., :1])), -1)
    with torch.autocast(query.device.type, enabled=False):
        key, value = (
            torch.cat((past.key, new.key), 2),
            torch.cat((past.value, new.value.to(past.value.dtype)), 2),
        )
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        key, value = (tensor.to(dtype).flatten(0, 1)[:, None] for tensor in (key, value))
        heads = query.to(dtype).unflatten(1, (kv_heads, -1)).flatten(0, 1)
        blocks = [
            _attend_block(part, start, key, value, new, past, visibility, scale, key_bias)
            for start, part in zip(range(0, query.shape[2], size), heads.split(size, 2), strict=True)
        ]
    return torch.cat(blocks, 2).unflatten(0, (rows, kv_heads)).flatten(1, 2).to(past.value.dtype)


def _attend_block(
    query: Tensor,
    start: int,
    key: Tensor,
    value: Tensor,
    new: NewTokens,
    past: Past,
    visibility: Visibility,
    scale: float,
    key_bias: KeyBias | None,
) -> Tensor:
    """Queries start .. of [b * g, h / g, q, d] on all keys and values [b * g, 1, n + s, d]."""
    queries = torch.arange(start, start + query.shape[2], device=query.device)
    behind = int(visibility.exclude_self)
    # The newest new key that any of these queries may see comes last.
    width = start + query.shape[2] - behind
    if past.key.shape[2] + width == 0:
        return torch.zeros_like(query)
    one = len(queries) == 1
    if one:  # the heads of a group see the same keys then: as queries of one head they cost less
        query = query.transpose(1, 2)
    key, value = (
        tensor[:, :, : past.key.shape[2] + width].expand(-1, query.shape[1], -1, -1)
        for tensor in (key, value)
    )
    shape = (*past.lengths.shape, len(queries), -1)
    of_new = _visible_new(queries, width, new.counted, visibility).expand(*shape[:3], width)
    seen = torch.cat((_visible_past(queries, new, past, visibility).expand(shape), of_new), -1).flatten(0, 1)[
        :, None
    ]
    mask = seen
    if key_bias is not None:
        bias = pad(_bias(new.key[:, :, :width], queries, behind), (past.key.shape[2], 0)).flatten(0, 1)[
            :, None
        ]
        mask = bias.to(query.dtype).masked_fill(~seen, -torch.inf)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    output = output.masked_fill(
        ~seen.any(-1, keepdim=True), 0.0
    )  # not all kernels know what the mean of nothing is
    return output.transpose(1, 2) if one else output


def _bias(key: Tensor, queries: Tensor, behind: int) -> Tensor:
    """[b, g, q, keys]: channel d - 1 of the keys, except at each query's frontier."""
    keys = torch.arange(key.shape[2], device=key.device)
    frontier = keys == queries[:, None] - behind
    return key[:, :, None, :, -1].masked_fill(frontier, 0.0)


def _visible_new(queries: Tensor, width: int, counted: Tensor | None, visibility: Visibility) -> Tensor:
    """bool, broadcasts to [b, g, q, width]."""
    keys = torch.arange(width, device=queries.device)
    distance = queries[:, None] - keys
    seen = distance >= int(visibility.exclude_self)
    if visibility.window is not None:
        seen = seen & (distance < visibility.window)
    if counted is None:
        return seen
    return seen & counted[:, None, None, :width]


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
