"""RMSNorm for layers from Megatron's local modules."""

import torch
from torch import Tensor

from megatron_ext.model.transformer_config import SharedKVTransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with the constructor that Megatron's specs call, computed as the run has chosen.

    Megatron's own wrapper of it refuses sequence parallelism; there the weight's gradient is partial on every
    rank and must be summed over the tensor-parallel group, which the attribute `sequence_parallel` of the
    weight asks for.
    """

    def __init__(self, config: SharedKVTransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._epsilon = eps
        self._normalise = config.operators.rms_norm.function

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same."""
        return self._normalise(x, self.weight, self._epsilon)
