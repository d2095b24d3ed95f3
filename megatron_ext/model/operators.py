"""What computes RMSNorm, SwiGLU and RoPE in a layer, and why: model.operator_backend.

`triton` is one kernel each, forward and backward: RMSNorm and SwiGLU are liger-kernel's, RoPE is this
project's, since no library turns heads of rows with different positions, or sets their last channel. `torch`
is PyTorch's RMSNorm and RoPE in PyTorch's operations; SwiGLU is Megatron's function on a GPU, where
torch.compile makes one kernel of it, and PyTorch's operations elsewhere.

Norms of Transformer Engine's layers are its own, whatever is chosen here.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core.fusions import fused_bias_swiglu
from torch import Tensor

from lckv.errors import UnsupportedError
from lckv.install import why_no_function
from lckv.rope import Turned, turned
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.errors import ConfigError

NAMES = ("torch", "triton")
LIGER_NORM = "liger_kernel.ops.rms_norm", "LigerRMSNormFunction"
LIGER_SWIGLU = "liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction"
"""What is used of liger-kernel: modules and functions."""
_LIGER_VERSION = "0.8.2"
"""The first that has them."""
_LIGER_CHANNELS = 65_536
"""The most that a row may have: a program reads it at once."""

Normalise = Callable[[Tensor, Tensor, float], Tensor]
"""RMSNorm of [..., channels], from weight [channels] and epsilon, to the same."""
Activate = Callable[[Tensor], Tensor]
"""SwiGLU: gate and linear part [s, b, 2 f], one after the other, to [s, b, f]."""

Function = TypeVar("Function")


@dataclass(frozen=True)
class Choice(Generic[Function]):
    """Whose function, and why."""

    name: str
    reason: str
    function: Function


@dataclass(frozen=True)
class Operators:
    """Those of a layer."""

    rms_norm: Choice[Normalise]
    swiglu: Choice[Activate]
    rope: Choice[Turned]


def choose_operators(
    model: ModelConfig, parallel: ParallelConfig, *, device: torch.device | None = None
) -> Operators:
    """For model.operator_backend and a model on `device`; default: the GPU if there is one. Raises
    ConfigError where what is asked for cannot serve."""
    name = model.operator_backend
    widest = max(model.hidden_size, model.ffn_size // parallel.tensor_model_parallel_size)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return choose(name, device=device, widest=widest)
    except UnsupportedError as error:
        raise ConfigError(
            f"model.operator_backend is {name}, but {error.obstacle}. Set model.operator_backend to auto or "
            "torch."
        ) from error


def choose(name: str, *, device: torch.device, widest: int) -> Operators:
    """The operators that `name` means, or for "auto" of each the kernel that serves. `widest`: the most
    channels of a row that is normalised or activated.

    Raises UnsupportedError where explicitly requested kernels cannot serve: there is no fallback.
    """
    requested = f"asked for {name}"
    swiglu = _compiled_swiglu if device.type == "cuda" else _swiglu
    author = "megatron" if device.type == "cuda" else "torch"
    if name == "torch":
        return Operators(
            Choice("torch", requested, _rms_norm),
            Choice(author, requested, swiglu),
            Choice("torch", requested, turned),
        )
    if name not in ("auto", "triton"):
        raise UnsupportedError(repr(name), f"the backends are auto, {', '.join(NAMES)}")
    no_triton = why_not_triton(device)
    no_liger = no_triton or why_not_liger(widest)
    if name == "triton" and no_liger is not None:
        raise UnsupportedError(name, no_liger)
    because = f"{requested}: {no_liger}"
    return Operators(
        Choice("torch", because, _rms_norm) if no_liger else Choice("liger", requested, _liger_norm()),
        Choice(author, because, swiglu) if no_liger else Choice("liger", requested, _liger_swiglu()),
        Choice("torch", f"{requested}: {no_triton}", turned)
        if no_triton
        else Choice("triton", requested, _triton_rope()),
    )


def why_not_triton(device: torch.device) -> str | None:
    """What keeps Triton's kernels from serving; None if nothing does."""
    if device.type != "cuda":
        return f"Triton's kernels need CUDA tensors, the model is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def why_not_liger(widest: int) -> str | None:
    """What keeps liger-kernel from serving; None if nothing does."""
    if widest > _LIGER_CHANNELS:
        return f"liger-kernel takes rows of at most {_LIGER_CHANNELS:,} channels, not {widest:,}"
    norm, swiglu = (
        why_no_function("liger-kernel", *used, _LIGER_VERSION) for used in (LIGER_NORM, LIGER_SWIGLU)
    )
    return norm or swiglu


def _rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(states, weight.shape, weight, eps)


def _swiglu(states: Tensor) -> Tensor:
    gate, linear = states.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * linear


def _compiled_swiglu(states: Tensor) -> Tensor:
    return fused_bias_swiglu.bias_swiglu_impl(states, None)


class LigerNormFunction(Protocol):
    """liger-kernel's autograd function."""

    def apply(
        self, X: Tensor, W: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool
    ) -> Tensor:
        """RMSNorm with `offset + W` as weights. "gemma": in float32 until the end, as PyTorch's. `in_place`
        writes the gradient over the one that arrives, which may be another's, too."""
        ...


class LigerSwiGLUFunction(Protocol):
    """liger-kernel's autograd function."""

    def apply(self, y: Tensor, in_place: bool) -> Tensor:
        """SwiGLU of [tokens, 2 f], which keeps `y`; `in_place` writes the gradient over it."""
        ...


def liger_norm(states: Tensor, weight: Tensor, eps: float, *, kernel: LigerNormFunction) -> Tensor:
    """See `Normalise`; `kernel` is liger-kernel's function."""
    return kernel.apply(states, weight, eps, 0.0, "gemma", False)


def liger_swiglu(states: Tensor, *, kernel: LigerSwiGLUFunction) -> Tensor:
    """See `Activate`; `kernel` is liger-kernel's function, whose gradient has two dimensions."""
    return kernel.apply(states.flatten(0, -2), False).unflatten(0, states.shape[:-1])


def _liger_norm() -> Normalise:
    return partial(liger_norm, kernel=_loaded(*LIGER_NORM))


def _liger_swiglu() -> Activate:
    return partial(liger_swiglu, kernel=_loaded(*LIGER_SWIGLU))


def _triton_rope() -> Turned:
    from lckv.kernels.rope import turned as in_triton

    return in_triton


def _loaded(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
