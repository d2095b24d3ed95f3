"""The loss of some tokens at a time: logits of other chunks are recomputed in backward.

Forward and backward compute the product with the output weight 4 times instead of 3,
and hold the logits of one chunk.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lckv.losses import whole
from lckv.losses.head import OutputHead


def token_loss(head: OutputHead, hidden_states: Tensor, targets: Tensor, *, chunk_size: int) -> Tensor:
    """See `TokenLoss`; `chunk_size` >= 1: tokens at a time, rounded down to whole places of all rows."""
    places = max(1, chunk_size // targets.shape[1])
    if places >= len(targets):
        return whole.token_loss(head, hidden_states, targets)
    chunks = zip(hidden_states.split(places), targets.split(places), strict=True)
    losses = [
        checkpoint(whole.token_loss, head, states, labels, use_reentrant=False, preserve_rng_state=False)
        for states, labels in chunks
    ]
    return torch.cat(losses)
