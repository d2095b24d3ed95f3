"""The loss as the formula says it, with the logits of all tokens in memory.
It is the oracle of every other backend."""

from torch import Tensor

from lckv.losses.head import OutputHead


def token_loss(head: OutputHead, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """See `TokenLoss`."""
    return head.cross_entropy(head.logits(hidden_states), targets)
