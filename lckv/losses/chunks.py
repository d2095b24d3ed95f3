"""A loss of hidden states under an output weight, over chunks of tokens: the logits of a chunk are made,
turned into losses and their gradient, and forgotten. Three products, as a plain layer has, and no logits are
made twice.

Shapes: n tokens, c of a chunk, h channels, v rows of the weight that this rank has.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lckv.losses.chunk_size import tokens_of_chunk
from lckv.losses.products import (
    add_of_weight,
    gradient_of_states,
    logits_of,
    room_for_logits,
    wide_dtype,
)
from lckv.losses.token_losses import TokenLosses, Vocabulary


class ChunkLoss(NamedTuple):
    """Of a chunk."""

    losses: Tensor
    """Cross-entropy [c], 0 of ignored tokens."""

    objective: Tensor | None
    """What is made small [c]; None: the cross-entropy."""

    gradient: Tensor | None
    """Of the weighted sum of the objective, by the logits [c, v]."""


class LossOfChunk(Protocol):
    """From the logits of a chunk to its losses and gradient."""

    def __call__(self, part: slice, logits: Tensor, targets: Tensor, weights: Tensor | None) -> ChunkLoss:
        """`part`: which of the n tokens. logits [c, v], wide, which may be overwritten, targets int64 [c],
        negative where ignored, and weights [c] of tokens; None: no gradient is wanted."""
        ...


def by_chunks(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: LossOfChunk,
    *,
    token_weights: Tensor | None,
    vocabulary: Vocabulary,
    weight_gradient: Tensor | None,
    chunk_size: int,
) -> TokenLosses:
    """See `linear_cross_entropy.linear_cross_entropy`, whose arguments these are."""
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
    wide = wide_dtype(states.dtype)
    if token_weights is None:
        token_weights = states.new_ones(len(states), dtype=wide)
    torch._assert_async((targets < vocabulary.size).all(), "a target is beyond the vocabulary")
    weights = token_weights.detach().to(wide).masked_fill(targets < 0, 0)
    size = tokens_of_chunk(len(weight), asked=chunk_size, number_bytes=wide.itemsize)
    plan = _Plan(loss, size, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return TokenLosses(*_ByChunks.apply(states, weight, targets, weights, weight_gradient, plan))


@dataclass(frozen=True)
class _Plan:
    """How the chunks are done."""

    loss: LossOfChunk
    size: int
    learns: bool


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        weight_gradient: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_states, of_weight = (plan.learns and needed for needed in ctx.needs_input_grad[:2])
        gradients = _Gradients.room(states, weight, weight_gradient, of_states, of_weight)
        losses, objective = torch.empty_like(weights), torch.empty_like(weights)
        room = room_for_logits(states, weight, plan.size)
        for start in range(0, len(states), plan.size):
            part = slice(start, start + plan.size)
            asked = weights[part] if of_states or of_weight else None
            done = plan.loss(part, logits_of(states[part], weight, room), targets[part], asked)
            losses[part] = done.losses
            objective[part] = done.losses if done.objective is None else done.objective
            if done.gradient is not None:
                gradients.add(part, done.gradient, states[part], weight)
            del done  # or its logits would be in memory beside the next ones
        ctx.added = of_weight and weight_gradient is not None
        ctx.dtypes = states.dtype, weight.dtype
        ctx.save_for_backward(gradients.states, None if ctx.added else gradients.weight)
        ctx.mark_non_differentiable(losses, objective)
        return losses, torch.dot(weights, objective), objective

    @staticmethod
    def backward(
        ctx: Any, _of_losses: Tensor, of_total: Tensor, _of_objective: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.added:
            torch._assert_async(of_total == 1, "the weight's gradient was added for a total of gradient 1")
        # in their place, so that a second backward is an error of autograd's
        of_states, of_weight = (
            None if gradient is None else gradient.mul_(of_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_states, of_weight, None, None, None, None


class _Gradients(NamedTuple):
    """Gradients that grow chunk by chunk; None: not wanted."""

    states: Tensor | None
    """[n, h]."""

    weight: Tensor | None
    """[v, h], wide."""

    @classmethod
    def room(
        cls, states: Tensor, weight: Tensor, weight_gradient: Tensor | None, of_states: bool, of_weight: bool
    ) -> "_Gradients":
        """Where they will be."""
        wide = wide_dtype(states.dtype)
        # float16 has no room for the gradient of a mean before it is scaled
        kept = wide if states.dtype == torch.float16 else states.dtype
        if of_weight and weight_gradient is None:
            weight_gradient = torch.zeros_like(weight, dtype=wide)
        return cls(
            torch.empty_like(states, dtype=kept) if of_states else None,
            weight_gradient if of_weight else None,
        )

    def add(self, part: slice, gradient: Tensor, states: Tensor, weight: Tensor) -> None:
        """What a chunk adds, from its logits' gradient [c, v]."""
        if self.states is not None:
            self.states[part] = gradient_of_states(gradient, weight)
        if self.weight is not None:
            add_of_weight(self.weight, gradient, states)
