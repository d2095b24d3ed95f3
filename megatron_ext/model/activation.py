"""SwiGLU (Shazeer 2020) as the part of Megatron's MLP between its two linear layers."""

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.model.transformer_config import SharedKVTransformerConfig


class SwiGLU(MegatronModule):
    """Computed as the run has chosen."""

    def __init__(self, config: SharedKVTransformerConfig) -> None:
        super().__init__(config=config)
        self._activate = config.operators.swiglu.function

    def forward(self, states: Tensor) -> Tensor:
        """Gate and linear part [s, b, 2 f], one after the other, to [s, b, f]."""
        return self._activate(states)
