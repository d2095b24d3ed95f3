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
from typing import Protocol

import torch
from torch import Tensor

from lckv.losses.chunks import ChunkLoss, by_chunks
from lckv.losses.token_losses import TokenLosses, Vocabulary


@dataclass(frozen=True)
class Terms:
    """What the loss is made of."""

    vocabulary: Vocabulary
    z_loss: float = 0.0
    soft_cap: float | None = None


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
    objective = None
    if terms.z_loss:
        objective = losses + (terms.z_loss * lse.square()).masked_fill(ignored, 0)
    if weights is None:
        return ChunkLoss(losses, objective, None)
    logits.mul_((weights * (1 + 2 * terms.z_loss * lse) * torch.exp(most - lse))[:, None])
    logits.scatter_add_(1, place[:, None], -weights.masked_fill(~here, 0)[:, None])
    if slope is not None:
        logits.mul_(slope)
    return ChunkLoss(losses, objective, logits)


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
    terms = Terms(vocabulary, z_loss, soft_cap)
    return by_chunks(
        states,
        weight,
        targets,
        lambda _part, logits, own, weights: kernel(logits, own, weights, terms),
        token_weights=token_weights,
        vocabulary=vocabulary,
        weight_gradient=weight_gradient,
        chunk_size=chunk_size,
    )
