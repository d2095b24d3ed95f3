"""The fused projection of queries, keys and values, which can also compute a part of them alone; the output
layer, which can also compute the loss alone."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from lckv.losses.token_losses import TokenLosses
from megatron_ext.model.implementation import has_fused_gradients

QKVPart = Literal["query", "keys and values"]


class QKVLinear(ColumnParallelLinear):
    """Megatron's fused projection. Rows of each KV head: its query heads, then its key, then its value.

    A pass of a cyclic group that only serves the next one needs no queries of its top layer, and a layer of a
    family of maps that only reads in a step needs nothing else: a `part` multiplies with its rows alone. The
    slicing happens inside `forward`, after the hooks of overlapped weight gathering.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        *,
        part: QKVPart | None = None,
        heads: tuple[int, int] = (0, 0),
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] to [s, b, rows of this rank], or with a `part` and `heads` = (KV heads of this rank,
        D) to [s, b, KV heads * 2 * D] or [s, b, query heads * D]. Rows of the other part get zeros for
        gradients."""
        if part is None:
            return super().forward(input_, weight)
        if not (self.allreduce_dgrad or self.sequence_parallel):
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        trained = self.weight.requires_grad
        linear = linear_with_grad_accumulation_and_async_allreduce if trained else linear_with_frozen_weight
        output = linear(
            input_,
            _rows_of(part, self.weight, *heads),
            None if self.bias is None else _rows_of(part, self.bias, *heads),
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )
        return output, None

    def can_project_part(self) -> bool:
        """Whether `part` may be used now: fused accumulation writes gradients of whole weights only."""
        fuses = self.gradient_accumulation_fusion and self.weight.requires_grad
        return not (fuses and torch.is_grad_enabled())


class TakingPart(torch.autograd.Function):
    """Weights that a step does not use, with zeros for gradients: Megatron's data parallelism waits for the
    gradient of every weight."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, *weights: Tensor) -> Tensor:
        """The states, as they are."""
        ctx.save_for_backward(*weights)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """That of the states, as it is."""
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


LossOfStates = Callable[[Tensor, Tensor, Tensor | None], TokenLosses]
"""loss(states [s, b, hidden], weight [rows of this rank, hidden], where its gradient is added up)."""


class OutputLinear(ColumnParallelLinear):
    """Megatron's output layer, which can also hand its weight to a loss that makes no logits.

    Weights are read inside `forward`, after the hooks of overlapped weight gathering.
    """

    def __init__(self, *arguments: Any, config: ModelParallelConfig, **options: Any) -> None:
        """As Megatron's, which refuses to add gradients to the sums itself where only Transformer Engine's
        layers can."""
        own_config = copy.copy(config)
        own_config.gradient_accumulation_fusion = has_fused_gradients()
        super().__init__(*arguments, config=own_config, **options)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        *,
        loss: LossOfStates | None = None,
        adds_gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None] | TokenLosses:
        """[s / shards, b, hidden] to [s, b, vocabulary of this rank], or to what `loss` makes of it. The
        states' gradient is summed over the ranks that share the vocabulary. `adds_gradient`: the loss adds
        that of the weight to the sums of data parallelism, where there are any."""
        if loss is None:
            return super().forward(input_, weight)
        if self.sequence_parallel:
            states = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            states = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        weight = self.weight if weight is None else weight
        sums = gradient_sums(weight) if adds_gradient else None
        return loss(states, weight if sums is None else _SummedElsewhere.apply(weight), sums)


def gradient_sums(weight: Tensor) -> Tensor | None:
    """Where Megatron's data parallelism lets gradients of a weight be added by the layer: its float32 sums;
    None where autograd is to bring them."""
    if not (torch.is_grad_enabled() and weight.requires_grad and hasattr(weight, "grad_added_to_main_grad")):
        return None
    sums: Tensor = weight.main_grad  # type: ignore[attr-defined]  # Megatron's
    return sums if sums.dtype == torch.float32 else None


class _SummedElsewhere(torch.autograd.Function):
    """A weight whose gradient goes to its `main_grad` by another way. Its hooks must run all the same, and
    want a gradient; what that says counts only where `zero_out_wgrad` tells that others add to it, as in
    Megatron's own layers (megatron/core/tensor_parallel/layers.py)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _nothing: None) -> Tensor:
        weight = ctx.weight
        weight.grad_added_to_main_grad = True
        is_shared = getattr(weight, "zero_out_wgrad", False)
        return torch.zeros_like(weight) if is_shared else torch.empty_like(weight)


class FirstGuessLinear(ColumnParallelLinear):
    """The first guess of a layer's keys and values. Rows of each KV head: its key, then its value.

    Its input has no gradient, so that none is computed, and none summed over ranks.
    """

    def __init__(
        self, config: ModelParallelConfig, input_size: int, output_size: int, group: ProcessGroup
    ) -> None:
        own_config = copy.copy(config)
        own_config.gradient_accumulation_fusion = has_fused_gradients()
        super().__init__(
            input_size,
            output_size,
            config=own_config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            tp_group=group,
        )

    def forward(self, input_: Tensor) -> Tensor:
        """[s / shards, b, hidden] without gradient to [s, b, rows of this rank]."""
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        return torch.nn.functional.linear(input_, self.weight)


def _rows_of(part: QKVPart, rows: Tensor, heads: int, head_dim: int) -> Tensor:
    groups = rows.view(heads, -1, *rows.shape[1:])
    return (groups[:, : -2 * head_dim] if part == "query" else groups[:, -2 * head_dim :]).flatten(0, 1)
