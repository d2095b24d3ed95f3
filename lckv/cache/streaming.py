"""Generation without end in constant memory: the first tokens (attention sinks) and the newest ones
(StreamingLLM, Xiao et al. 2023).

Queries see what is kept at positions within the cache: sinks at 0, 1, ..., the others right behind them.
Attention depends on distances only, and the newest tokens keep theirs; so their keys stay as they came,
rotated to running positions, and it is the query that is turned to where the sinks see it. Before running
positions grow large they begin again, and keys are turned once for that.

A layer that has a sliding window of its own, within that of the cache, sees what it was trained to see: its
window and no sinks.

Shapes: b rows, s new tokens, h query heads, g KV heads, d channels of a head.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.attention import parts
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv.policies.base import Extension, KVPolicy
from lckv.rope import rotate, rotation
from lckv.sharing.mixing import Second

_QUERIES = 128
"""Queries attended at once: scores have b x h x _QUERIES x (sinks + 2 window + _QUERIES) entries."""


class _Kept(NamedTuple):
    """What is kept of a layer."""

    window: int
    """Tokens that readers see at most, besides sinks, their own included."""

    sinks: tuple[Tensor, Tensor]
    """Keys and values [b, g, sinks, d] of the first tokens, at positions 0, 1, ..."""

    newest: tuple[Tensor, Tensor]
    """Keys and values [b, g, r, d] of newer ones, at running positions; token t in place t % r."""

    def with_second(self, other: "_Kept", second: Second) -> "_Kept":
        """What a layer reads that reads this one and `other`, of which the same tokens are kept."""
        sinks, newest = second.joined(self.sinks, other.sinks), second.joined(self.newest, other.newest)
        return _Kept(self.window, sinks, newest)


class StreamingCache:
    """Implements `KVCache` for rows that begin together. It is never `empty`: not even the first tokens see
    all that came before."""

    empty = False

    def __init__(
        self,
        layers: Iterable[int],
        policy: KVPolicy,
        windows: Mapping[int, int],
        *,
        rows: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        frequencies: Tensor,
        sinks: int = 4,
        window: int,
    ) -> None:
        """`layers` compute keys and values; `windows` holds those of them that only windowed layers read,
        with the window in tokens. `frequencies` are RoPE's (`lckv.rope.inverse_frequencies`). A query sees
        the first `sinks` tokens and the newest `window`, its own included.

        Raises ValueError for a KV policy that does not keep every token, and for sizes out of range.
        """
        if not policy.traits.keeps_every_token:
            raise ValueError(
                f"the KV policy is {policy.name}; streaming with attention sinks drops single tokens, which "
                "needs a policy that keeps every token in a slot of its own: generate within the model's "
                "context instead, or use a model with such a policy."
            )
        for name, size, least in (("rows", rows, 1), ("sinks", sinks, 0), ("window", window, 1)):
            if size < least:
                raise ValueError(f"{name} is {size}; it must be at least {least}.")
        device = torch.device(device)
        self._sinks, self._window, self._frequencies = sinks, window, frequencies.to(device)
        self._widest = max(window, *windows.values(), 1)

        def pair(tokens: int) -> tuple[Tensor, Tensor]:
            key, value = torch.zeros(2, rows, kv_heads, tokens, head_dim, dtype=dtype, device=device)
            return key, value

        self._layers = {
            layer: _Kept(seen, pair(0 if layer in windows else sinks), pair(max(1, seen - 1)))
            for layer in layers
            for seen in [windows.get(layer, window)]
        }
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._start = torch.zeros_like(self._tokens)
        """int64 [b]: the token whose running position is 0."""
        self._fewest = self._furthest = 0
        """Bounds that are known without asking the device: of tokens in any row, and of running positions."""

    @property
    def seen(self) -> Tensor:
        """int64 [b]: running position of each row's next token."""
        return self._tokens - self._start

    @property
    def rope_length(self) -> int:
        """See `KVCache`: no query sees further."""
        return self._sinks + self._window

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        kept = [tensor for layer in self._layers.values() for tensor in (*layer.sinks, *layer.newest)]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*kept, self._tokens, self._start))

    def state(self, layer: int) -> Tensor | None:
        """See `KVCache`; there is none."""
        return None

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
        kept, tokens = self._layers[layer], len(new.key)
        if second is not None:
            kept = kept.with_second(self._layers[second.layer], second)
        window, sinks = kept.window, self._sinks
        if visibility.window is not None and visibility.window <= window:
            window, sinks = visibility.window, 0
        token = self._new_tokens(tokens, counted)
        key, value = (tensor.permute(1, 2, 0, 3) for tensor in (new.key, new.value))
        # Padding is a token that no query sees.
        fresh = token if counted is None else token.masked_fill(~counted, -1)
        if places is not None:
            token = token.gather(1, places)
        older = _tokens_in(kept.newest[0].shape[2], self._tokens)
        if sinks:
            sink_key, sink_value = self._sinks_with(kept, key, value, counted)
            sink = torch.arange(sinks, device=query.device).expand(len(query), -1)
            turned = self._within_cache(query, token)
        outputs = []
        for start in range(0, query.shape[2], _QUERIES):
            block, near = slice(start, start + _QUERIES), slice(None)
            if places is None:
                near = slice(max(0, start - window + 1), start + _QUERIES)
            newest = token[:, block] - int(visibility.exclude_self)
            oldest = (token[:, block] - window + 1).clamp(min=0)
            groups = [
                parts.Part(query[:, :, block], *kept.newest, _between(older, oldest, newest)),
                parts.Part(
                    query[:, :, block],
                    key[:, :, near],
                    value[:, :, near],
                    _between(fresh[:, near], oldest, newest),
                ),
            ]
            if sinks:
                behind = _between(sink, torch.zeros_like(oldest), token[:, block] - window)
                groups.append(parts.Part(turned[:, :, block], sink_key, sink_value, behind))
            outputs.append(parts.attend_parts(groups, scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    @torch.no_grad()
    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        """See `KVCache`. Raises ValueError unless there is exactly one extension
        for every layer of the cache."""
        if extensions.keys() != self._layers.keys():
            raise ValueError(
                f"the cache holds layers {sorted(self._layers)}; keys and values of {sorted(extensions)} "
                "came."
            )
        tokens = len(next(iter(extensions.values())).key)
        added = torch.full_like(self._tokens, tokens) if counted is None else counted.sum(1)
        for layer, extension in extensions.items():
            kept = self._layers[layer]
            key, value = (tensor.permute(1, 2, 0, 3) for tensor in (extension.key, extension.value))
            if kept.sinks[0].shape[2] and self._fewest < self._sinks:
                _copy(kept.sinks, self._sinks_with(kept, key, value, counted))
            places = kept.newest[0].shape[2]
            if tokens == 1 and counted is None:
                index = (self._tokens % places)[:, None, None, None].expand_as(key)
                for old, new in zip(kept.newest, (key, value), strict=True):
                    old.scatter_(2, index, new)
            else:
                newest = _tokens_in(places, self._tokens + added)
                _copy(kept.newest, self._with_new(kept.newest, (key, value), newest, counted))
        self._tokens += added
        self._fewest += tokens if counted is None else 0
        self._furthest += tokens
        if self._furthest > self._sinks + 2 * self._widest:
            self._begin_again()

    def _new_tokens(self, count: int, counted: Tensor | None) -> Tensor:
        """int64 [b, s]: which token of its row each new one is; of padding, something in range."""
        if counted is None:
            return self._tokens[:, None] + torch.arange(count, device=self._tokens.device)
        return self._tokens[:, None] + (counted.cumsum(1) - 1).clamp(min=0)

    def _within_cache(self, query: Tensor, token: Tensor) -> Tensor:
        """Queries [b, h, s, d], turned from their running positions to those within the cache."""
        position = token.clamp(max=self._sinks + self._window - 1)
        angles = rotation((position - (token - self._start[:, None]))[:, None], self._frequencies)
        return rotate(query.float(), angles).to(query.dtype)

    def _sinks_with(
        self, kept: _Kept, key: Tensor, value: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the sinks, with those that are among new ones [b, g, s, d]."""
        if self._fewest >= self._sinks:
            return kept.sinks
        sink = torch.arange(self._sinks, device=key.device).expand(len(key), -1)
        return self._with_new(kept.sinks, (key, value), sink, counted)

    def _with_new(
        self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], token: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`old` [b, g, r, d] where place i of a row belongs to `token` [b, r], if that is not among the new
        ones [b, g, s, d]."""
        there = token - self._tokens[:, None]  # how many new ones come before it
        added = new[0].shape[2] if counted is None else counted.sum(1)[:, None]
        is_new = ((there >= 0) & (there < added))[:, None, :, None]
        if counted is not None:
            there = there + counted.int().argmax(1)[:, None]
        index = there.clamp(0, new[0].shape[2] - 1)[:, None, :, None].expand_as(old[0])
        key, value = (
            fresh.gather(2, index).where(is_new, before) for before, fresh in zip(old, new, strict=True)
        )
        return key, value

    def _begin_again(self) -> None:
        """Give the next token a running position that is not larger than the cache. A key is turned once or
        twice while it is kept."""
        self._furthest = self._sinks + self._widest
        shift = (self.seen - self._furthest).clamp(min=0)
        self._start += shift
        angles = rotation(-shift[:, None, None], self._frequencies)
        for kept in self._layers.values():
            key = kept.newest[0]
            key.copy_(rotate(key.float(), angles))


def _copy(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    for before, after in zip(old, new, strict=True):
        before.copy_(after)


def _tokens_in(places: int, tokens: Tensor) -> Tensor:
    """int64 [b, places]: which token lies in each place after `tokens` [b] tokens;
    negative where none does."""
    newest = tokens[:, None] - 1
    return newest - (newest - torch.arange(places, device=tokens.device)) % places


def _between(key: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """bool [b, q, n]: keys [b, n] that lie in the range of each query, `first` .. `last` [b, q]."""
    return (key[:, None] >= first[..., None]) & (key[:, None] <= last[..., None])
