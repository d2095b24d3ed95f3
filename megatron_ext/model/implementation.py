"""Whose modules layers are made of, and what follows from it for gradients of weights."""

import importlib.util
from dataclasses import dataclass

import torch

from lckv.install import INSTALL_GPU
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class ImplementationChoice:
    """Whose modules the layers are made of, and why."""

    name: str
    reason: str


def choose_implementation(requested: str, precision: str) -> ImplementationChoice:
    """`model.transformer_impl` to local or transformer_engine, for `train.precision`.

    Raises ConfigError for an explicit request that cannot be met.
    """
    asked = f"model.transformer_impl is {requested}"
    if requested == "local":
        return ImplementationChoice("local", asked)
    missing = obstacle_to_transformer_engine()
    if precision == "fp32":
        # Its products of float32 numbers are TF32, whatever torch is told (cublaslt_gemm.cu, 2.0 to 2.19).
        missing = "train.precision is fp32, which Transformer Engine multiplies as TF32"
    if missing is None:
        return ImplementationChoice("transformer_engine", asked)
    if requested == "transformer_engine":
        raise ConfigError(f"{asked}, but {missing}. Set model.transformer_impl to auto or local.")
    return ImplementationChoice("local", f"{asked}: {missing}")


def obstacle_to_transformer_engine() -> str | None:
    """Why nothing of Transformer Engine can be used on this machine; None where it can."""
    if not torch.cuda.is_available():
        return "Transformer Engine needs CUDA"
    if importlib.util.find_spec("transformer_engine") is None:
        return f"the package transformer-engine is not installed ({INSTALL_GPU})"
    return None


def has_fused_gradients() -> bool:
    """Whether Megatron's own linear layers can add gradients of weights to the float32 sums at once: by a
    module of apex. Transformer Engine's layers bring what they need."""
    return (
        torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    )


def accumulates_in_place(implementation: str) -> bool:
    """Whether gradients of the layers' weights are added to the float32 sums by the layers themselves."""
    return implementation == "transformer_engine" or has_fused_gradients()
