"""The dense policy: every token keeps its key and value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lckv.policies.base import Extension, KeyValue, Statistics, TokenContext


class DensePolicy:
    """The identity among KV policies; see `KVPolicy` for the contract."""

    name = "dense"
    reads_query = False
    biases_keys = False

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """Nothing is random."""
        return None

    def query(self, query: Tensor, context: TokenContext) -> Tensor:
        """RoPE and nothing else."""
        return context.rotate(query)

    def keys_values(
        self, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics | None]:
        """RoPE on the keys and nothing else.

        Values get memory of their own: as a view of the fused projection they would keep its queries alive as
        long as any reader needs them.
        """
        return KeyValue(context.rotate(key), value.contiguous()), None

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> Extension:
        """Every token is a slot of its own."""
        return Extension(*self.keys_values(key, value, query, context)[0])

    def whole(self, extension: Extension) -> Tensor | None:
        """All of them."""
        return None

    def auxiliary_loss(self, merge_rate: Tensor, progress: float) -> Tensor | None:
        """No auxiliary loss."""
        return None
