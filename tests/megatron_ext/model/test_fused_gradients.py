"""Layers that add gradients to the float32 sums themselves, as Transformer Engine's do."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from lckv.config import CompressionConfig
from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.model import implementation, specs, transformer_config
from megatron_ext.model.build import build_stage
from megatron_ext.model.implementation import accumulates_in_place, has_fused_gradients
from megatron_ext.model.linear import OutputLinear
from megatron_ext.model.norm import RMSNorm
from megatron_ext.parallel.process_groups import initialize
from tests.megatron_ext.model.stages import MODEL, VOCAB, draw_tokens, make_stage, positions_of
from tests.ranks import run_on_ranks

PLANS = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 2), (7, 2)]
"""(m, b)."""


@pytest.mark.parametrize("recompute", [False, True])
def test_every_pass_of_a_plan_adds_its_gradient(recompute: bool) -> None:
    """The rule of Transformer Engine's backward, under Megatron's wrapper, over plans (m, b)."""
    (errors,) = run_on_ranks(1, errors_over_plans, recompute, True)
    assert max(errors.values()) < 1e-5


def test_the_rule_overwrites_where_the_first_micro_batch_is_told() -> None:
    (errors,) = run_on_ranks(1, errors_over_plans, False, False)
    assert {plan for plan, error in errors.items() if error > 0.1} == {(0, 2), (0, 3), (1, 2), (1, 3)}


def errors_over_plans(recompute: bool, cured: bool) -> dict[tuple[int, int], float]:
    """Largest relative error of a weight's gradient, of two micro-batches together."""
    initialize(ParallelConfig(), seed=1)
    train = TrainConfig(precision="fp32", recompute_granularity="full" if recompute else "none")
    return {plan: error_of(plan, train, cured) for plan in PLANS}


def error_of(plan: tuple[int, int], train: TrainConfig, cured: bool) -> float:
    compression = CompressionConfig(
        layer_types="0_4_4_4_4_5", forward_passes=plan[0], backward_passes=plan[1]
    )
    expected = gradients(build(compression, train))
    with pytest.MonkeyPatch.context() as patch:
        modules = specs._Modules(RMSNorm, FusedColumn, FusedColumn, FusedRow, fused_norms=False)
        patch.setattr(specs, "_modules", lambda implementation: modules)
        config = transformer_config.SharedKVTransformerConfig
        if not cured:
            patch.setattr(
                transformer_config,
                "SharedKVTransformerConfig",
                lambda **options: config(**{**options, "disable_parameter_transpose_cache": False}),
            )
        stage = build(compression, train)
    given = gradients(stage)
    assert given.keys() == expected.keys()
    return max(
        ((given[name] - gradient).norm() / gradient.norm()).item() for name, gradient in expected.items()
    )


def build(compression: CompressionConfig, train: TrainConfig) -> torch.nn.Module:
    return build_stage(MODEL, compression, ParallelConfig(), train, vocab_size=VOCAB)


def gradients(stage: torch.nn.Module) -> dict[str, Tensor]:
    stage.train()
    for parameter in stage.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    for seed in range(2):
        tokens = draw_tokens(2, 16, seed)
        losses, _ = stage(tokens, positions_of(tokens), tokens)
        (losses.total / tokens.numel()).backward()
    return {
        name: parameter.main_grad + (0 if parameter.grad is None else parameter.grad)
        for name, parameter in stage.named_parameters()
    }


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, is_first_microbatch: bool | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.weight, ctx.accumulate = weight, is_first_microbatch is None or not is_first_microbatch
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, 1).t() @ inputs.flatten(0, 1)
        if ctx.accumulate:
            ctx.weight.main_grad += of_weight
        else:
            ctx.weight.main_grad.copy_(of_weight)
        return gradient @ weight, torch.zeros_like(weight), None


class _Fused:
    """Whose forward does what Megatron's wrapper of Transformer Engine's layers does (one rank)."""

    def _multiply(self, inputs: Tensor) -> tuple[Tensor, None]:
        told = None if self.config.disable_parameter_transpose_cache else self.is_first
        self.is_first = False
        return _Product.apply(inputs, self.weight, told), None


class FusedColumn(_Fused, ColumnParallelLinear):
    is_first = True

    def forward(self, inputs: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        return self._multiply(inputs)


class FusedRow(_Fused, RowParallelLinear):
    is_first = True

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        return self._multiply(inputs)


def test_transformer_engine_adds_gradients_without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accumulates_in_place("transformer_engine")
    assert not accumulates_in_place("local")
    assert not has_fused_gradients()
    monkeypatch.setattr(implementation.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(implementation.importlib.util, "find_spec", lambda name: object())
    assert accumulates_in_place("local")


def test_the_output_layer_can_be_built_where_only_transformer_engine_adds_gradients() -> None:
    assert run_on_ranks(1, build_output_layer) == [(False, True)]


def build_output_layer() -> tuple[bool, bool]:
    """What the layer does, and what the other layers are told."""
    stage = make_stage(CompressionConfig())
    config = stage.config
    config.gradient_accumulation_fusion = True
    layer = OutputLinear(
        8,
        16,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=False,
        gather_output=False,
        skip_weight_param_allocation=False,
        tp_group=stage.pg_collection.tp,
    )
    return layer.gradient_accumulation_fusion, config.gradient_accumulation_fusion


@pytest.mark.parametrize(
    ("requested", "precision", "said"),
    [("auto", "fp32", "multiplies as TF32"), ("local", "bf16", "model.transformer_impl is local")],
)
def test_float32_is_not_given_to_transformer_engine(requested: str, precision: str, said: str) -> None:
    choice = implementation.choose_implementation(requested, precision)
    assert choice.name == "local"
    assert said in choice.reason
