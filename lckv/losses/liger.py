"""The softmax and its gradient in liger-kernel's Triton kernels, vocabulary-parallel; the chunks and the
products are those of `linear_cross_entropy`."""

from typing import Protocol

import torch
from torch import Tensor

from lckv.losses.chunks import ChunkLoss
from lckv.losses.linear_cross_entropy import Terms

MODULE, FUNCTION = "liger_kernel.ops.vocab_parallel_cross_entropy", "LigerVocabParallelCEFunction"
"""What is used of liger-kernel."""
_IGNORED = -100


class VocabParallelCrossEntropy(Protocol):
    """liger-kernel's autograd function."""

    def apply(
        self,
        vocab_parallel_logits: Tensor,
        target: Tensor,
        tp_group: object,
        ignore_index: int,
        label_smoothing: float,
        label_smoothing_formula: str,
        label_smoothing_mode: str,
    ) -> Tensor:
        """Losses float32 [s, b] of logits [s, b, v] and targets int64 [s, b] of the whole vocabulary."""
        ...


def chunk_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    terms: Terms,
    *,
    kernel: VocabParallelCrossEntropy,
) -> ChunkLoss:
    """See `ChunkKernel`, without z-loss and soft-cap; `kernel` is liger-kernel's function."""
    assert not terms.z_loss and terms.soft_cap is None
    terms.vocabulary.hide_padding(logits)
    targets = targets.masked_fill(targets < 0, _IGNORED)
    with torch.set_grad_enabled(weights is not None):
        logits = logits[:, None].requires_grad_(weights is not None)
        group = terms.vocabulary.group if terms.vocabulary.is_split else None
        losses = kernel.apply(logits, targets[:, None], group, _IGNORED, 0.0, "pytorch", "global")
        if weights is None:
            return ChunkLoss(losses[:, 0], None, None)
        (gradient,) = torch.autograd.grad(losses, logits, weights[:, None])
    return ChunkLoss(losses.detach()[:, 0], None, gradient[:, 0])
