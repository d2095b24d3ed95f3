"""A cache that waits with new tokens until it is decided how many of them it takes in: drafts, of which some
are accepted.

Nothing ever comes back out of a cache, so this is exact with every KV policy, those that merge and drop
included. Keys and values of a token do not depend on tokens behind it; only what a policy carries on
(`Extension.state`) is that of all new tokens, and is made again of those that are taken in.

Shapes: b rows, s new tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv.cache.base import KVCache
from lckv.policies.base import Extension, KVPolicy, TokenContext
from lckv.sharing.mixing import Second


class Projected(NamedTuple):
    """What the extension of a layer was made of: the arguments of `KVPolicy.extend`."""

    policy: KVPolicy
    state: Tensor | None
    key: Tensor
    value: Tensor
    read: Tensor | None
    context: TokenContext

    def of(self, counted: Tensor) -> Extension:
        """The extension by those tokens alone that `counted` bool [b, s] names."""
        context = replace(self.context, counted=counted.transpose(0, 1))
        return self.policy.extend(self.state, self.key, self.value, self.read, context)


class UndecidedCache:
    """Implements `KVCache` around `cache`, which `commit` leaves as it is, and `take_in` fills."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._projected: dict[int, Projected] = {}
        self._held: tuple[Mapping[int, Extension], Tensor | None] | None = None

    @property
    def empty(self) -> bool:
        """See `KVCache`."""
        return self._cache.empty

    @property
    def seen(self) -> Tensor:
        """See `KVCache`."""
        return self._cache.seen

    @property
    def rope_length(self) -> int | None:
        """See `KVCache`."""
        return self._cache.rope_length

    def state(self, layer: int) -> Tensor | None:
        """See `KVCache`."""
        return self._cache.state(layer)

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
        )

    def note(self, layer: int, extension: Extension, projected: Projected) -> None:
        """Called by a layer: what its `extension` was made of. Of several passes the last one counts."""
        if extension.state is not None:
            self._projected[layer] = projected

    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        """Keep new tokens for `take_in`. Padding is behind each row's tokens."""
        self._held = extensions, counted

    @torch.no_grad()
    def take_in(self, counts: Sequence[int]) -> None:
        """Let the cache have the first `counts` of the new tokens of each row, once; the others are
        forgotten. Raises what the cache's `commit` raises."""
        assert self._held is not None, "nothing came, or it was taken in before"
        (extensions, came), self._held = self._held, None
        tokens, rows = next(iter(extensions.values())).key.shape[:2]
        assert len(counts) == rows and max(counts) <= tokens
        if min(counts) == tokens:
            self._cache.commit(extensions, came)
            return
        device = next(iter(extensions.values())).key.device
        counted = torch.arange(tokens, device=device) < torch.tensor(counts, device=device)[:, None]
        if came is not None:
            counted = counted & came
        again = {layer: projected.of(counted) for layer, projected in self._projected.items()}
        self._cache.commit({**extensions, **again}, counted)
