"""liger-kernel's RMSNorm and SwiGLU as the project calls them, on CPU through Triton's interpreter: numbers
against float64, and a model of them with RoPE's kernel against one of PyTorch's operations.

Not collected by name: Triton decides when it is imported whether it interprets, so `test_operators.py` runs
this file in a process of its own, with TRITON_INTERPRET=1 and liger-kernel's sources.
"""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model import operators
from megatron_ext.model.memory import kept_bytes, kept_for_backward, recomputed_of_stage
from megatron_ext.parallel.process_groups import destroy, initialize
from tools.benchmarks.activation_memory import Step

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Relative to the largest number. The interpreter cuts off where a GPU rounds to bfloat16."""
_ORIGINAL = interpreter._implicit_cvt
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
    vocab_size=40, make_vocab_size_divisible_by=8,
)  # fmt: skip


def as_compiled(argument: Any) -> Any:
    """Arguments as a compiled kernel gets them. The interpreter leaves floats as they are."""
    if not isinstance(argument, float):
        return _ORIGINAL(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "why_not_triton", lambda device: None)
    monkeypatch.setattr(interpreter, "_implicit_cvt", as_compiled)
    norm = importlib.import_module(operators.LIGER_NORM[0])
    # that of CUDA's library cannot be interpreted
    monkeypatch.setattr(norm, "rsqrt", lambda number: tl.math.rsqrt(number))


def chosen() -> operators.Operators:
    return operators.choose("triton", device=torch.device("cpu"), widest=48)


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for one, exact in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 2, 24), (3, 2, 4, 8)], ids=["hidden states", "heads"])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Heads are a part of what a projection makes. What arrives as a gradient is left alone."""
    states, weight = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    gradient = torch.randn(shape).to(dtype)
    arrived = gradient.clone()
    leaves = [tensor.requires_grad_() for tensor in (states, weight)]
    normed = chosen().rms_norm.function(states[..., : shape[-1]], weight, 1e-3)
    found = normed, *torch.autograd.grad(normed, leaves, arrived)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    part = exact[0][..., : shape[-1]]
    expected = part * (part.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * exact[1]
    compare(found, (expected, *torch.autograd.grad(expected, exact, gradient.double())), dtype)
    assert torch.equal(arrived, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swiglu(dtype: torch.dtype) -> None:
    """The interpreter cannot multiply numbers of bfloat16."""
    states = torch.randn(5, 2, 48).to(dtype).requires_grad_()
    before, gradient = states.detach().clone(), torch.randn(5, 2, 24).to(dtype)
    activated = chosen().swiglu.function(states)
    found = activated, *torch.autograd.grad(activated, states, gradient)
    exact = before.double().requires_grad_()
    gate, linear = exact.chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * linear
    compare(found, (expected, *torch.autograd.grad(expected, exact, gradient.double())), dtype)
    assert torch.equal(states.detach(), before), "they may be needed once more"


@pytest.fixture
def _groups() -> Iterator[None]:
    initialize(ParallelConfig(), seed=1)
    yield
    destroy()


def layers_of(backend: str, number: int, precision: str, options: dict[str, bool]) -> tuple[Step, int]:
    """A step of so many layers, and what the formulas say that they keep."""
    model = replace(
        MODEL, num_layers=number, operator_backend=backend, qk_layernorm=options.get("qk_layernorm", False)
    )
    compression = CompressionConfig(force_nodiag=options.get("force_nodiag", False))
    train = TrainConfig(micro_batch_size=2, seq_length=6, precision=precision, recompute_granularity="none")
    kept = kept_for_backward(compression, number, range(number), recomputed_of_stage(train, range(number)))
    fused = backend == "triton"
    predicted = kept_bytes(kept, model, compression, ParallelConfig(), train, fused=fused)
    return Step.of(model, compression, train), predicted


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp32", {}), ("bf16", {"force_nodiag": True}), ("bf16", {"qk_layernorm": True})],
    ids=["plain", "excluded self", "query and key norm"],
)
def test_a_layer_keeps_what_the_formulas_say(precision: str, options: dict[str, bool]) -> None:
    steps, predicted = zip(
        *(layers_of("triton", number, precision, options) for number in (1, 2)), strict=True
    )
    one, two = (step.saved_bytes() for step in steps)
    # queries that see nothing have no logsumexp, and PyTorch's kernel keeps the output once, flash-attn twice
    less = 2 * (4 * MODEL.num_attention_heads + 6 * 2 * MODEL.hidden_size)
    assert two - one == predicted[1] - predicted[0] - less * options.get("force_nodiag", False)


@pytest.mark.usefixtures("_groups")
def test_gradients_of_a_model_are_those_of_pytorchs_operations() -> None:
    gradients = []
    for backend in ("triton", "torch"):
        torch.manual_seed(3)  # of the tokens
        step, _ = layers_of(backend, 2, "fp32", {"qk_layernorm": True})
        gradients.append([parameter.grad for parameter in step.parameters])
    assert len(gradients[0]) > 10
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
