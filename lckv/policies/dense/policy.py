"""The dense policy: every token keeps its key and value."""

from torch import Tensor

from lckv.policies.base import Extension, KeyValue, KVPolicy, Statistics, TokenContext


class DensePolicy(KVPolicy):
    """The identity among KV policies."""

    def keys_values(
        self, key: Tensor, value: Tensor, read: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics]:
        """RoPE on the keys and nothing else.

        Values get memory of their own: as a view of the fused projection they would keep its queries alive as
        long as any reader needs them."""
        return KeyValue(context.rotate(key), value.contiguous()), ()

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, read: Tensor | None, context: TokenContext
    ) -> Extension:
        """Every token is a slot of its own."""
        return Extension(*self.keys_values(key, value, read, context)[0])
