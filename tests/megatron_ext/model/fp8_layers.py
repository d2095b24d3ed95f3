"""Stand-ins for Megatron's wrappers of Transformer Engine's layers in FP8, on the CPU, with its rules: when a
weight is quantised anew, whose backward overwrites the gradient, and what is kept for checkpoints."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_ext.model import specs
from megatron_ext.model.norm import RMSNorm


class Call(NamedTuple):
    """One forward of a layer."""

    layer: str
    in_fp8: bool
    has_gradient: bool
    told: bool | None
    """Whether it is the first forward since the weight changed; None: not told."""


@dataclass
class Machine:
    """What Transformer Engine keeps for a whole process."""

    in_fp8: bool = False
    contexts: list[str] = field(default_factory=list)
    """Formats of the contexts that were entered."""
    calls: list[Call] = field(default_factory=list)

    @contextmanager
    def context(self, config: Any) -> Iterator[None]:
        assert not self.in_fp8
        self.in_fp8 = True
        self.contexts.append(config.fp8)
        try:
            yield
        finally:
            self.in_fp8 = False


@contextmanager
def fp8_machine() -> Iterator[Machine]:
    """Stages that are built inside have these layers, and their contexts are those of the machine."""
    machine = Machine()
    column = type("Column", (_Layer, ColumnParallelLinear), {"machine": machine})
    row = type("Row", (_Layer, RowParallelLinear), {"machine": machine})
    modules = specs._Modules(RMSNorm, column, column, row, fused_norms=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs, "_modules", lambda implementation: modules)
        patch.setattr(fp8_utils, "get_fp8_context", machine.context)
        patch.setattr(fp8_utils, "get_fp8_recipe", lambda config: f"{config.fp8_recipe} {config.fp8}")
        yield machine


class _Layer:
    machine: Machine

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.is_first_microbatch = True
        self.disable_parameter_transpose_cache = self.config.disable_parameter_transpose_cache
        self.kept: Tensor | None = None
        self.scaling: dict[str, Any] = {}

    def forward(self, inputs: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        told = None if self.disable_parameter_transpose_cache else self.is_first_microbatch
        self.is_first_microbatch = False
        gradient = torch.is_grad_enabled()
        self.machine.calls.append(Call(str(id(self)), self.machine.in_fp8, gradient, told))
        quantised = self._quantised(told) if self.machine.in_fp8 else self.weight.detach()
        if self.machine.in_fp8:
            self._note_scale()
        return _Product.apply(inputs, self.weight, quantised, told is None or not told), None

    def _quantised(self, told: bool | None) -> Tensor:
        if told is None:
            return _in_fp8(self.weight)
        if told or self.kept is None:
            self.kept = _in_fp8(self.weight)
        return self.kept

    def _note_scale(self) -> None:
        """Delayed scaling: from one step to the next, the same on all ranks."""
        if self.config.fp8_recipe == "delayed" and self.training and torch.is_grad_enabled():
            before = self.scaling.get("scale_fwd", torch.ones(1))
            largest = (before + self.weight.detach().abs().max()) / 2
            names = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
            self.scaling = dict.fromkeys(names, largest)

    def get_extra_state(self) -> Tensor:
        if not self.scaling:
            return torch.empty(0, dtype=torch.uint8)
        variables = {"num_gemms": 1, "fp8_checkpoint": True, "key": object}
        content = {"recipe": "delayed hybrid", "extra_fp8_variables": variables, **self.scaling}
        return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        content = pickle.loads(state.numpy().tobytes())
        assert content.pop("recipe") == "delayed hybrid"
        assert content.pop("extra_fp8_variables") == {"num_gemms": 1, "fp8_checkpoint": True}
        self.scaling = content


def _in_fp8(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float8_e4m3fn).to(weight.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, quantised: Tensor, accumulates: bool) -> Tensor:
        ctx.save_for_backward(inputs, quantised)
        ctx.weight, ctx.accumulates = weight, accumulates
        return inputs @ quantised.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, quantised = ctx.saved_tensors
        of_weight = gradient.flatten(0, 1).t() @ inputs.flatten(0, 1)
        if not hasattr(ctx.weight, "main_grad"):
            return gradient @ quantised, of_weight, None, None
        if ctx.accumulates:
            ctx.weight.main_grad += of_weight
        else:
            ctx.weight.main_grad.copy_(of_weight)
        return gradient @ quantised, torch.zeros_like(quantised), None, None
