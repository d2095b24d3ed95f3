"""Parameters of a KV policy's own on Megatron's ranks (`lckv.policies.config.Projection`).

They are small, and every tensor-parallel rank has them whole: so only the numbers that they make are sent,
one for each token and KV head, and never hidden states. Ranks that share a sequence out multiply their own
tokens; their gradients are summed over the ranks, as those of norms are.
"""

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ext.model.transformer_config import SharedKVTransformerConfig


def kv_heads_of_rank(heads: int, group: ProcessGroup) -> slice:
    """Which of the model's KV heads a tensor-parallel rank has; with more ranks than heads, several ranks
    have the same."""
    mine = max(1, heads // group.size())
    first = group.rank() * heads // group.size()
    return slice(first, first + mine)


class PolicyLinear(torch.nn.Linear):
    """From normed inputs of a layer to a number for each of its KV heads."""

    def __init__(self, config: SharedKVTransformerConfig, group: ProcessGroup, *, per_layer: bool) -> None:
        """`per_layer`: the first head's number is that of all."""
        heads = config.num_query_groups
        super().__init__(config.hidden_size, heads, bias=config.add_qkv_bias, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._group, self._sequence_parallel, self._per_layer = group, config.sequence_parallel, per_layer
        self._own = kv_heads_of_rank(heads, group)

    def forward(self, normed: Tensor) -> Tensor:
        """[s / shards, b, hidden] to [s, b, g, 1], of the g KV heads of this rank."""
        numbers = super().forward(normed)
        # Each rank uses some of what all have: backward sums what the ranks say of it.
        if self._sequence_parallel:
            numbers = gather_from_sequence_parallel_region(numbers, group=self._group)
        else:
            numbers = copy_to_tensor_model_parallel_region(numbers, group=self._group)
        own = numbers[..., self._own]
        return (numbers[..., :1].expand_as(own) if self._per_layer else own)[..., None]
