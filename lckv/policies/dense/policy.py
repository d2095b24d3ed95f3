"""The dense policy: every token keeps its key and value."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.policies.base import KeyValue, Statistics


class DensePolicy:
    """The identity among KV policies; see `KVPolicy` for the contract."""

    name = "dense"
    reads_query = False

    def draw_noise(self, shape: Sequence[int], device: torch.device, generator: torch.Generator) -> Tensor | None:
        """Nothing is random."""
        return None

    def query(self, query: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        """RoPE and nothing else."""
        return rotate(query)

    def keys_values(
        self,
        key: Tensor,
        value: Tensor,
        rotate: Callable[[Tensor], Tensor],
        *,
        query: Tensor | None = None,
        noise: Tensor | None = None,
        documents: Documents | None = None,
        training: bool = False,
    ) -> tuple[KeyValue, Statistics | None]:
        """RoPE on the keys and nothing else."""
        return KeyValue(rotate(key), value), None

    def auxiliary_loss(self, statistics: Sequence[Statistics], progress: float) -> Tensor | None:
        """No auxiliary loss."""
        return None

    def update_slots(self, slots: KeyValue | None, new: KeyValue, statistics: Statistics | None = None) -> KeyValue:
        """Append."""
        if slots is None:
            return new
        return KeyValue(torch.cat((slots.key, new.key)), torch.cat((slots.value, new.value)))
