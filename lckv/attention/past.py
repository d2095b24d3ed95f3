"""Attention of new tokens to themselves and to what a cache holds of earlier ones.

Where nothing but causality hides keys, many new tokens are the last queries of all tokens
(`last_queries.py`), and one new token sees all that there are, both without a mask. Elsewhere queries are
walked in blocks under a mask, so nothing of size (new tokens) x (all tokens) is made. It is what decoding and
continued prompts use; a prompt without a past is ordinary attention (`backends.py`).

Shapes: b rows, h query heads, g KV heads, s new tokens, n slots, d channels of a head.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lckv.attention.aten_pairs import choose_pair
from lckv.attention.key_bias import KeyBias
from lckv.attention.last_queries import attend_last
from lckv.attention.ring import ring_place
from lckv.attention.unbiased import without_bias
from lckv.attention.visibility import Visibility
from lckv.errors import UnsupportedError
from lckv.sharing.mixing import Second

_BLOCK = 128
"""Queries per block, at most. With fewer, nobody asks the device whether they need a mask."""

_MASK = 2**24
"""Entries of the mask of a block, at most: b x g x queries x (n + s)."""


class Past(NamedTuple):
    """What a cache holds of one layer."""

    key: Tensor
    """[b, g, n, d], rotated; entries beyond a head's length are finite."""

    value: Tensor
    """[b, g, n, d]."""

    lengths: Tensor
    """int64 [b, g]: slots in use, the first ones. Under a window slots are tokens, the newest last; else
    `NewTokens.seen` says how they stand."""

    even: bool = False
    """Whether it is known, without asking the device, that all heads use all n slots, in order."""

    spare: tuple[Tensor, Tensor] | None = None
    """Keys and values [b, g, n + 1, d] in the same memory: the last place may be written."""

    def with_second(self, other: "Past", second: Second) -> "Past":
        """What a layer reads that reads this one, whose slots hold the same tokens as those of `other`,
        too."""
        return Past(*second.joined(self[:2], other[:2]), self.lengths, self.even and other.even)

    def newest(self, tokens: int) -> "Past":
        """The slots that hold the newest `tokens` of each row, and where rows differ in length, more."""
        fewest = self.key.shape[2] if self.even else int(self.lengths.min())
        start = fewest - tokens
        if start <= 0:
            return self
        key, value = (tensor[:, :, start:] for tensor in self[:2])
        spare = None if self.spare is None else (self.spare[0][:, :, start:], self.spare[1][:, :, start:])
        return Past(key, value, self.lengths - start, self.even, spare)

    def and_one(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [b, g, n + 1, d], those of one new token [b, g, 1, d] last. Nothing else is
        copied where there is a spare place for keys of this dtype, and no gradient."""
        if self.spare is None or torch.is_grad_enabled() or key.dtype != self.key.dtype:
            return torch.cat((self.key, key), 2), torch.cat((self.value, value.to(self.value.dtype)), 2)
        for memory, new in zip(self.spare, (key, value), strict=True):
            memory[:, :, -1:] = new
        return self.spare


class NewTokens(NamedTuple):
    """Keys and values that are not in the cache yet."""

    key: Tensor
    """[b, g, s, d]."""

    value: Tensor
    """[b, g, s, d]."""

    counted: Tensor | None
    """bool [b, s]: those that are not padding; None: all. Where keys have a bias, they lie side by side in
    each row."""

    hides: Tensor | None
    """bool [b, g, a]: which of the newest a slots of the past, the oldest first, are hidden from queries that
    are as many places behind them as the key bias says; None: none."""

    documents: Tensor | None = None
    """int64 [b, s]: the document of each, where none of them began in the past; None: one and the same."""

    seen: Tensor | None = None
    """int64 [b]: tokens before them, where the newest of these are a ring in front of the other slots
    (`ring.py`); None: slots stand in order."""


class Columns(NamedTuple):
    """Where the slots of the past stand in a batch that has padding between tokens. A window counts columns
    then, padding included."""

    distance: Tensor
    """int64 [b, g, n]: columns from each slot to the first new token."""

    shown: Tensor | None
    """bool [b, g, n]: slots that new tokens may see; None: all."""


def nothing_before(new: NewTokens) -> Past:
    """The past of tokens that have none."""
    rows, heads = new.key.shape[:2]
    lengths = torch.zeros(rows, heads, dtype=torch.int64, device=new.key.device)
    return Past(new.key[:, :, :0], new.value[:, :, :0], lengths)


def attend_past(
    query: Tensor,
    new: NewTokens,
    past: Past,
    visibility: Visibility,
    *,
    scale: float,
    key_bias: KeyBias | None = None,
    columns: Columns | None = None,
    places: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * query key^T) value over the visible keys, 0 for a query that sees none; query [b, h, s,
    d + e], result [b, h, s, d] in the dtype of the values.

    `visibility` (without documents) and `key_bias` as in `reference.attend`; the bias of a new key is added
    to its score as it is, and keys of the past have none. `columns`: for policies without bias; None: all
    slots are shown, and a window counts tokens. `places` int64 [b, q]: the new tokens of each row that have
    queries, [b, h, q, d + e], at least one; None: all. Scores are float32."""
    if past.even and _sees_all(new, key_bias, columns):
        with _no_autocast(query.device.type):
            return _attend_one(query, new, past, visibility, scale, dropout)
    many = query.shape[2] >= _BLOCK and places is None and not torch.compiler.is_compiling()
    if many and visibility.window is not None and columns is None:
        past = past.newest(visibility.window - 1)
    rows, kv_heads, older, _ = past.key.shape
    new_key = new.key
    if many and dropout == 0 and visibility.window is None and key_bias is None and columns is None:
        with _no_autocast(query.device.type):
            output = _attend_unmasked(query, new, past, visibility, scale)
        if output is not None:
            return output.to(past.value.dtype)
    if key_bias is not None:  # what a key's last channel says is said by the mask
        query, new_key = (without_bias(heads, key_bias.extra_channels) for heads in (query, new.key))
    with _no_autocast(query.device.type):
        query, key, value = _of_one_dtype(query, new_key, new.value, past)
        key, value = (tensor.flatten(0, 1)[:, None] for tensor in (key, value))
        heads = query.unflatten(1, (kv_heads, -1)).flatten(0, 1)
        entries = rows * kv_heads * (older + new.key.shape[2])
        blocks = [
            _attend_block(*block, key, value, new, past, visibility, scale, key_bias, columns, dropout)
            for block in _blocks(heads, places, new.key.shape[2], entries)
        ]
    return torch.cat(blocks, 2).unflatten(0, (rows, kv_heads)).flatten(1, 2).to(past.value.dtype)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    """Nothing, which is cheaper, where there is none."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _sees_all(new: NewTokens, key_bias: KeyBias | None, columns: Columns | None) -> bool:
    """Whether there is one new token, from which nothing but a window or itself is hidden."""
    alone = new.key.shape[2] == 1 and new.counted is None and new.documents is None
    return alone and key_bias is None and columns is None


def _attend_one(
    query: Tensor, new: NewTokens, past: Past, visibility: Visibility, scale: float, dropout: float
) -> Tensor:
    """As `attend_past` of one new token in each row, [b, h, q, d], and of a past that is even."""
    if visibility.window is not None:
        past = past.newest(visibility.window - 1)
    key, value = past[:2] if visibility.exclude_self else past.and_one(new.key, new.value)
    if key.shape[2] == 0:
        return torch.zeros_like(query, dtype=past.value.dtype)
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # The heads of a group see the same keys: as queries of one head they cost less.
    heads = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    output = scaled_dot_product_attention(heads, key, value, scale=scale, dropout_p=dropout)
    return output.unflatten(2, (-1, query.shape[2])).flatten(1, 2).to(past.value.dtype)


def _blocks(
    heads: Tensor, places: Tensor | None, tokens: int, entries: int
) -> list[tuple[Tensor, Tensor, int]]:
    """Queries [b * g, h / g, q, d] in blocks, each with the new tokens that they are those of, int64 [b or 1,
    block], and a number that all of these are below. `places` of `attend_past`; `entries` of the mask of one
    query."""
    every = places is None
    if places is None:
        places = torch.arange(tokens, device=heads.device)[None]
    if torch.compiler.is_compiling():  # in one block: a traced length is no number to count with
        return [(heads, places, tokens)]
    size = min(_BLOCK, max(1, _MASK // max(1, entries)))
    starts = range(0, heads.shape[2], size)
    ends = [min(start + size, tokens) if every else tokens for start in starts]
    return [*zip(heads.split(size, 2), places.split(size, 1), ends, strict=True)]


def _of_one_dtype(
    query: Tensor, new_key: Tensor, new_value: Tensor, past: Past
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, and all keys and values [b, g, n + s, d]."""
    key, value = new_key, new_value.to(past.value.dtype)
    if past.key.shape[2]:
        key, value = torch.cat((past.key, key), 2), torch.cat((past.value, value), 2)
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _attend_unmasked(
    query: Tensor, new: NewTokens, past: Past, visibility: Visibility, scale: float
) -> Tensor | None:
    """As `attend_past` where nothing of its own hides keys; None where that takes a mask: tokens do not
    count, heads use different numbers of slots, or kernels without a mask do not take the heads."""
    if new.counted is not None or new.documents is not None or new.hides is not None:
        return None
    if not past.even:
        fewest, most = torch.stack(past.lengths.aminmax()).tolist()
        if fewest != most:
            return None
        past = Past(past.key[:, :, :most], past.value[:, :, :most], past.lengths, even=True)
    query, key, value = _of_one_dtype(query, new.key, new.value, past)
    try:
        pair = choose_pair(query)
    except UnsupportedError:
        return None
    return attend_last(query, key, value, visibility, scale=scale, dropout=0.0, pair=pair)


def _attend_block(
    query: Tensor,
    queries: Tensor,
    end: int,
    key: Tensor,
    value: Tensor,
    new: NewTokens,
    past: Past,
    visibility: Visibility,
    scale: float,
    key_bias: KeyBias | None,
    columns: Columns | None,
    dropout: float,
) -> Tensor:
    """Some of the queries, [b * g, h / g, q, d], which are those of new tokens `queries` (int64 [b or 1, q],
    all below `end`), on all keys and values [b * g, 1, n + s, d]."""
    # The newest new key that any of these queries may see comes last.
    width = end - int(visibility.exclude_self)
    if past.key.shape[2] + width == 0:
        return torch.zeros_like(query)
    one = queries.shape[1] == 1
    if one:  # the heads of a group see the same keys then: as queries of one head they cost less
        query = query.transpose(1, 2)
    key, value = (
        tensor[:, :, : past.key.shape[2] + width].expand(-1, query.shape[1], -1, -1)
        for tensor in (key, value)
    )
    shape = (*past.lengths.shape, queries.shape[1], -1)
    of_new = _visible_new(queries, width, new, visibility).expand(*shape[:3], width)
    first_biased = None if key_bias is None else key_bias.first_biased(exclude_self=visibility.exclude_self)
    of_past = _visible_past(queries, new, past, visibility, first_biased, columns).expand(shape)
    # [b, g, q, n + s] to [b * g, 1, q, n + s]
    seen = torch.cat((of_past, of_new), -1).flatten(0, 1)[:, None]
    mask = seen
    if first_biased is not None:
        of_new_keys = _bias(new.key[:, :, :width], queries, first_biased)
        bias = pad(of_new_keys, (past.key.shape[2], 0)).flatten(0, 1)[:, None]
        mask = bias.to(query.dtype).masked_fill(~seen, -torch.inf)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, dropout_p=dropout)
    output = output.masked_fill(
        ~seen.any(-1, keepdim=True), 0.0
    )  # not all kernels know what the mean of nothing is
    return output.transpose(1, 2) if one else output


def _bias(key: Tensor, queries: Tensor, first_biased: int) -> Tensor:
    """[b, g, q, keys]: the last channel of the keys, 0 for those that are too young for a query."""
    keys = torch.arange(key.shape[2], device=key.device)
    young = queries[..., None] - keys < first_biased
    return key[:, :, None, :, -1].masked_fill(young[:, None], 0.0)


def _visible_new(queries: Tensor, width: int, new: NewTokens, visibility: Visibility) -> Tensor:
    """bool, broadcasts to [b, g, q, width]."""
    keys = torch.arange(width, device=queries.device)
    distance = queries[..., None] - keys
    seen = distance >= int(visibility.exclude_self)
    if visibility.window is not None:
        seen = seen & (distance < visibility.window)
    if new.counted is not None:
        seen = seen & new.counted[:, None, :width]
    if new.documents is not None:
        own = new.documents.gather(1, queries.expand(len(new.documents), -1))
        seen = seen & (own[..., None] == new.documents[:, None, :width])
    return seen[:, None]


def _visible_past(
    queries: Tensor,
    new: NewTokens,
    past: Past,
    visibility: Visibility,
    first_biased: int | None,
    columns: Columns | None,
) -> Tensor:
    """bool [b, g, q or 1, n]."""
    slots = torch.arange(past.key.shape[2], device=queries.device)
    lengths = past.lengths[:, :, None, None]
    seen = slots < lengths
    if columns is not None:
        if columns.shown is not None:
            seen = seen & columns.shown[:, :, None]
        if visibility.window is not None:
            distance = columns.distance[:, :, None] + queries[:, None, :, None]
            seen = seen & (distance < visibility.window)
        return seen
    if visibility.window is None and new.hides is None:
        return seen
    # Counted tokens between the past and each query.
    ahead = queries
    if new.counted is not None:
        before = new.counted.cumsum(1) - new.counted.long()
        ahead = before.gather(1, queries.expand(len(before), -1))
    ahead = ahead[:, None, :, None]
    if visibility.window is not None:
        seen = seen & (lengths - slots + ahead < visibility.window)
    if new.hides is not None and first_biased is not None:
        # [b, g, n]: each slot's place among the newest ones.
        age = new.hides.shape[-1]
        if new.seen is None:
            place = slots - past.lengths[..., None] + age
        else:
            place = ring_place(slots, new.seen[:, None, None], age).expand(*past.lengths.shape, -1)
        hidden = new.hides.gather(-1, place.clamp(0, age - 1)) & (place >= 0)
        seen = seen & ~(hidden[:, :, None] & ((age - place)[:, :, None] + ahead >= first_biased))
    return seen
