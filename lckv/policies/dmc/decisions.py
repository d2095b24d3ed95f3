"""Merge decisions: from the last channel of keys and queries to what is merged, what is hidden, and what is
counted.

Shapes: s tokens, b rows, g KV heads, h query heads, d channels of a head. Everything here is float32,
whatever the model's dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from lckv.attention.key_bias import HIDDEN
from lckv.policies.base import TokenContext


class Decisions(NamedTuple):
    """What becomes of each token."""

    merge: Tensor
    """[s, b, g]: 1 merges the token into the last slot, 0 opens a new one; between 0 and 1 in training."""

    bias: Tensor
    """[s, b, g]: log(1 - merge of the next token), at least `HIDDEN`:
    what a later query adds to the score of this token."""


def decision_logits(key: Tensor, initial_bias: float) -> Tensor:
    """x [s, b, g]: above 0 where a token shall be merged, from keys [s, b, g, d] before RoPE."""
    return key[..., -1].float() - initial_bias


def importance(query: Tensor, kv_heads: int, initial_bias: float, eps: float) -> Tensor:
    """w [s, b, g]: weight of a token in its slot, the mean over the query heads of a group, from queries [s,
    b, h, d] before RoPE."""
    return torch.sigmoid(query[..., -1].float().unflatten(-1, (kv_heads, -1)).mean(-1) + initial_bias) + eps


def forced_openings(logits: Tensor, context: TokenContext) -> Tensor:
    """bool [s, b]: tokens that open a slot whatever their decision is: the first of each document, padding,
    and what follows it."""
    tokens, rows = logits.shape[:2]
    opens = context.begins(tokens, rows, logits.device)
    if context.counted is not None:
        padding = ~context.counted
        opens = opens | padding | pad(padding[:-1], (0, 0, 1, 0))
    return opens


def soft_decisions(logits: Tensor, opens: Tensor, noise: Tensor | None, temperature: float) -> Decisions:
    """Decisions of training, from x [s, b, g], `forced_openings` and noise [s, b, g] (none: 0)."""
    noisy = (logits if noise is None else logits + noise) / temperature
    noisy = noisy.masked_fill(opens[..., None], -torch.inf)
    return Decisions(torch.sigmoid(noisy), _of_the_next(logsigmoid(-noisy).clamp(min=HIDDEN)))


def hard_decisions(logits: Tensor, opens: Tensor) -> Decisions:
    """Decisions of evaluation, 0 or 1, from x [s, b, g] and forced openings, [s, b] or [s, b, g]."""
    merge = ((logits > 0) & ~(opens[..., None] if opens.dim() == 2 else opens)).float()
    return Decisions(merge, _of_the_next(merge * HIDDEN))


def _of_the_next(bias: Tensor) -> Tensor:
    return pad(bias[1:], (0, 0, 0, 0, 0, 1))
