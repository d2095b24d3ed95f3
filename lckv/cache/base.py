"""What an inference cache is: it holds what the layers that compute keys and values have made of earlier
tokens.

A model reads the cache while it runs on new tokens and commits what it has computed for them when the last
layer is done. So the passes of a plan can run on the same past as often as needed, and a forward that fails
leaves the cache as it was.

Shapes: b rows, s new tokens, h query heads, g KV heads, d channels of a head.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv.policies.base import Extension
from lckv.sharing.mixing import Second


class KVCache(Protocol):
    """Keys and values of earlier tokens, one entry per layer that computes them."""

    @property
    def empty(self) -> bool:
        """Whether no row has any token yet."""
        ...

    @property
    def seen(self) -> Tensor:
        """int64 [b]: tokens of each row so far, which is the position of its next one."""
        ...

    @property
    def rope_length(self) -> int | None:
        """Tokens of the text for which keys are rotated, where rotary embeddings depend on it, so that keys
        stay as they are when a text grows; None: in each call up to the last position that comes."""
        ...

    def state(self, layer: int) -> Tensor | None:
        """What the KV policy kept of `layer`, for `KVPolicy.extend`;
        None before the first token, or where it keeps nothing."""
        ...

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
        """Attention of `query` [b, h, s, d] to what `layer` has made of earlier tokens, or to what `second`
        makes of that and of another layer's, and to `new`; the same shape. `places` int64 [b, q]: the new
        tokens of each row that have queries, [b, h, q, d]; None: all."""
        ...

    def commit(self, extensions: Mapping[int, Extension], counted: Tensor | None) -> None:
        """Take in new tokens: what each layer that computes keys and values has made of them. `counted` is
        bool [b, s]; None: no token is padding."""
        ...
