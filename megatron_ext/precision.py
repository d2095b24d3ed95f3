"""What `train.precision` means: one object that says it all.
Torch and Megatron are loaded only by those who need them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lckv.precision import bytes_of, torch_dtype

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Precision:
    """The numbers that a run computes with."""

    name: Literal["fp32", "bf16"]
    """As `train.precision` has it."""

    dtype_name: str
    """Of weights and activations, as PyTorch calls it."""

    @property
    def dtype(self) -> "torch.dtype":
        """Of weights and activations."""
        return torch_dtype(self.dtype_name)

    @property
    def bytes(self) -> int:
        """Of a number in weights and activations."""
        return bytes_of(self.dtype_name)

    @property
    def is_bf16(self) -> bool:
        """Whether there are float32 main weights besides the model's own."""
        return self.dtype_name == "bfloat16"

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's state per parameter: two float32 moments,
        and main weights where there are any."""
        return 12 if self.is_bf16 else 8

    def wrap(self, config: "TransformerConfig", stage: "MegatronModule") -> "MegatronModule":
        """The model in this precision, as Megatron's data parallelism takes it."""
        from megatron.core.transformer.module import Float16Module

        return Float16Module(config, stage) if self.is_bf16 else stage


_PRECISIONS = {kind.name: kind for kind in (Precision("fp32", "float32"), Precision("bf16", "bfloat16"))}


def precision(name: Literal["fp32", "bf16"]) -> Precision:
    """The precision that `train.precision` names."""
    return _PRECISIONS[name]


def precision_for(dtype: "torch.dtype") -> Precision:
    """A precision that can hold weights of `dtype`."""
    return next((kind for kind in _PRECISIONS.values() if kind.dtype == dtype), _PRECISIONS["fp32"])
