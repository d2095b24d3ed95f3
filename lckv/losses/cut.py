"""The loss by cut-cross-entropy (Wijmans et al. 2024), whose kernels hold one tile of the logits at a time
and make it again in backward.

Of the released package (25.1): the weight's gradient is summed in bfloat16, a host waits for the number of
ignored tokens, and what is filtered out of the gradient is softmax below 1/32 of the precision.
"""

from typing import Protocol

from torch import Tensor

from lckv.losses.token_losses import TokenLosses, Vocabulary

MODULE, FUNCTION = "cut_cross_entropy", "linear_cross_entropy"
"""What is used of cut-cross-entropy."""
_IGNORED = -100


class CutCrossEntropy(Protocol):
    """The package's function."""

    def __call__(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        *,
        ignore_index: int,
        softcap: float | None,
        reduction: str,
        filter_eps: float | str | None,
        impl: str,
    ) -> Tensor:
        """Losses float32 [n] of states [n, h], weight [v, h] and targets int64 [n]."""
        ...


def cut_cross_entropy(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    weight_gradient: Tensor | None = None,
    soft_cap: float | None = None,
    filtered: bool = False,
    kernel: CutCrossEntropy,
) -> TokenLosses:
    """See `LinearCrossEntropy`; one rank has the whole vocabulary, and the weight's gradient goes through
    autograd. `filtered`: gradients leave out what hardly counts. `kernel` is the package's function."""
    assert weight_gradient is None
    assert vocabulary is None or not vocabulary.is_split
    true = weight if vocabulary is None else weight[: vocabulary.size]
    losses = kernel(
        states,
        true,
        targets.masked_fill(targets < 0, _IGNORED),
        ignore_index=_IGNORED,
        softcap=soft_cap,
        reduction="none",
        filter_eps="auto" if filtered else None,
        impl="cce",
    )
    weighted = losses if token_weights is None else losses * token_weights
    return TokenLosses(losses.detach(), weighted.sum(), losses.detach())
