"""What a loss needs to know of a language model's output layer.

Shapes: n tokens in any number of dimensions, v rows of the vocabulary that this rank holds.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class OutputHead(Protocol):
    """From hidden states to a loss per token. A vocabulary may be split over ranks; the head knows of it."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [n, hidden] to logits [n, v]."""
        ...

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token, float32 [n] in nats, from logits [n, v] and targets int64 [n] of the whole
        vocabulary. The logits may be overwritten."""
        ...


TokenLoss = Callable[[OutputHead, Tensor, Tensor], Tensor]
"""loss(head, hidden_states, targets): of hidden states [s, b, hidden] and targets int64 [s, b], the loss of
each token, float32 [s, b]."""
