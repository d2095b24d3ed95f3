"""Linear layer and cross-entropy over chunks of tokens, without the logits of all tokens in memory.

As a plain computation, with the soft-cap c (Gemma 2, section 2) and the z-loss z (PaLM, section 5) left out
where they are not given:

    logits = states @ weight.t()                                 [n, v]
    logits = c tanh(logits / c)
    lse    = logsumexp(logits, 1)                                 padding left out
    losses = lse - logits[target]
    total  = sum(token_weights * (losses + z lse^2))

The weight of each token is known before, so a chunk's gradients are made right after its logits, which are
then forgotten: three products, as a plain layer has, and no logits are made twice. With p = softmax(logits):

    d total / d logits = token_weights * ((1 + 2 z lse) p - onehot(target)) * (1 - (logits / c)^2)

Where the vocabulary is split over ranks, a chunk costs one collective: (logsumexp, target's logit) of each
rank. The gradient of the states is then this rank's part of it, which the caller sums over ranks.

Shapes: n tokens, c of a chunk, h channels, v rows of this rank.
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


@dataclass(frozen=True)
class Terms:
    """What the loss is made of."""

    vocabulary: Vocabulary
    z_loss: float = 0.0
    soft_cap: float | None = None


class ChunkLoss(NamedTuple):
    """Of a chunk."""

    losses: Tensor
    """Cross-entropy [c]."""

    penalty: Tensor | None
    """z-loss [c]; None: there is none."""

    gradient: Tensor | None
    """Of the weighted sum of both, by the logits [c, v]."""


class ChunkKernel(Protocol):
    """From the logits of a chunk to its losses and gradient."""

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms) -> ChunkLoss:
        """logits [c, v], which may be overwritten, targets int64 [c], negative where ignored, and weights [c]
        of tokens; None: no gradient is wanted."""
        ...


def softmax_kernel(logits: Tensor, targets: Tensor, weights: Tensor | None, terms: Terms) -> ChunkLoss:
    """See `ChunkKernel`: PyTorch's operations, in the logits' own memory (with a soft-cap, twice that)."""
    slope = None
    if terms.soft_cap is not None:
        logits.div_(terms.soft_cap).tanh_()
        if weights is not None:
            slope = torch.square(logits).neg_().add_(1)
        logits.mul_(terms.soft_cap)
    place, here = terms.vocabulary.places(targets, logits.shape[1])
    own_logit = logits.gather(1, place[:, None])[:, 0].masked_fill(~here, 0)
    terms.vocabulary.hide_padding(logits)
    # a rank may have nothing but padding: its maximum is -inf, which less itself is no number
    most = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)
    logits.sub_(most[:, None]).exp_()
    lse, logit = terms.vocabulary.join(most + logits.sum(1).log_(), own_logit)
    ignored = targets < 0
    losses = (lse - logit).masked_fill(ignored, 0)
    penalty = None
    if terms.z_loss:
        penalty = (terms.z_loss * lse.square()).masked_fill(ignored, 0)
    if weights is None:
        return ChunkLoss(losses, penalty, None)
    logits.mul_((weights * (1 + 2 * terms.z_loss * lse) * torch.exp(most - lse))[:, None])
    logits.scatter_add_(1, place[:, None], -weights.masked_fill(~here, 0)[:, None])
    if slope is not None:
        logits.mul_(slope)
    return ChunkLoss(losses, penalty, logits)


def linear_cross_entropy(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    weight_gradient: Tensor | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_size: int = 0,
    kernel: ChunkKernel = softmax_kernel,
) -> TokenLosses:
    """The loss of hidden states [n, h] under the output weight [v, h], for targets int64 [n] of the whole
    vocabulary; tokens with a negative target are ignored. Sums are made in float32, in float64 of float64.

    `token_weights` [n]: of each token in the total, default 1; they get no gradient. `vocabulary`: what the
    rows stand for, default: each for a token. `weight_gradient` float32 [v, h]: the gradient of the weight is
    added to it at once, in forward, and autograd gets none; the gradient of the total must then be 1, and
    every forward counts. `chunk_size`: tokens at a time, 0: see `chunk_size.py`.

    Under no_grad only losses are computed. A target beyond the vocabulary is an error, on CUDA one of the
    device; so is a total whose gradient is not 1 in spite of `weight_gradient`.
    """
    vocabulary = Vocabulary(len(weight)) if vocabulary is None else vocabulary
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
    plan = _Plan(Terms(vocabulary, z_loss, soft_cap), size, kernel, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        losses, total = _ByChunks.apply(states, weight, targets, weights, weight_gradient, plan)
    return TokenLosses(losses, total)


@dataclass(frozen=True)
class _Plan:
    """How the chunks are done."""

    terms: Terms
    size: int
    kernel: ChunkKernel
    learns: bool

    def chunk(
        self, states: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, room: Tensor | None
    ) -> ChunkLoss:
        """Of the tokens of a chunk; the gradient may lie in `room`."""
        return self.kernel(logits_of(states, weight, room), targets, weights, self.terms)


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
    ) -> tuple[Tensor, Tensor]:
        of_states, of_weight = (plan.learns and needed for needed in ctx.needs_input_grad[:2])
        gradients = _Gradients.room(states, weight, weight_gradient, of_states, of_weight)
        losses, penalty = torch.empty_like(weights), torch.zeros_like(weights)
        room = room_for_logits(states, weight, plan.size)
        for start in range(0, len(states), plan.size):
            part = slice(start, start + plan.size)
            asked = weights[part] if of_states or of_weight else None
            done = plan.chunk(states[part], weight, targets[part], asked, room)
            losses[part] = done.losses
            if done.penalty is not None:
                penalty[part] = done.penalty
            if done.gradient is not None:
                gradients.add(part, done.gradient, states[part], weight)
            del done  # or its logits would be in memory beside the next ones
        ctx.added = of_weight and weight_gradient is not None
        ctx.dtypes = states.dtype, weight.dtype
        ctx.save_for_backward(gradients.states, None if ctx.added else gradients.weight)
        ctx.mark_non_differentiable(losses)
        return losses, torch.dot(weights, losses + penalty)

    @staticmethod
    def backward(ctx: Any, _of_losses: Tensor, of_total: Tensor) -> tuple[Tensor | None, ...]:
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
