"""What a loss is given and gives, whatever computes it.

Shapes: n tokens, h channels of a hidden state, v rows of the output weight that this rank holds.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
    """The losses of tokens."""

    losses: Tensor
    """Cross-entropy of each token in nats, float32 (float64 of float64 states), without gradient: for masks
    and reports. 0 of ignored tokens. A z-loss is not in it."""

    total: Tensor
    """Sum over tokens of token weight x objective, a number. The gradient goes through it."""

    objective: Tensor
    """What is made small, of each token and without gradient: the cross-entropy and the z-loss, or what
    `linear_distillation` says."""


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens the rows of a rank's output weight stand for."""

    size: int
    """True tokens of the whole vocabulary; ids from it on are padding, which gets no probability."""

    first: int = 0
    """Id of this rank's first row."""

    group: dist.ProcessGroup | None = None
    """The ranks that share the vocabulary, equally many rows each, in order; None: this one has all of it."""

    @property
    def is_split(self) -> bool:
        """Whether other ranks have rows."""
        return self.group is not None and self.group.size() > 1

    def places(self, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """For targets int64 [n]: their rows among this rank's `rows`, 0 where they are not here, int64 [n];
        and whether they are here, bool [n]."""
        here = (targets >= self.first) & (targets < self.first + rows)
        return (targets - self.first).masked_fill(~here, 0), here

    def hide_padding(self, logits: Tensor, never: float = -torch.inf) -> None:
        """Give padding no probability in logits [n, v]: the logit `never`."""
        true = min(max(self.size - self.first, 0), logits.shape[1])
        if true < logits.shape[1]:
            logits[:, true:] = never

    def join(self, lse: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
        """Of the whole vocabulary, from this rank's logsumexp [n], and the target's logit [n], which is 0 on
        ranks that do not have it. One collective."""
        if not self.is_split:
            return lse, logit
        parts = self.of_ranks(torch.stack((lse, logit)))
        return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)

    def of_ranks(self, mine: Tensor) -> Tensor:
        """What each rank has, [ranks, *mine.shape], in order. One collective."""
        if not self.is_split:
            return mine[None]
        assert self.group is not None
        parts = mine.new_empty((self.group.size(), *mine.shape))
        dist.all_gather_into_tensor(parts.flatten(0, 1), mine.contiguous(), group=self.group)
        return parts

    def sum(self, parts: Tensor) -> Tensor:
        """Of the whole vocabulary, from what each rank has of it, which may be overwritten. One
        collective."""
        if self.is_split:
            dist.all_reduce(parts, group=self.group)
        return parts


class LinearCrossEntropy(Protocol):
    """The loss from hidden states and the output weight."""

    def __call__(
        self,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        token_weights: Tensor | None = None,
        vocabulary: Vocabulary | None = None,
        weight_gradient: Tensor | None = None,
    ) -> TokenLosses:
        """states [n, h], weight [v, h], targets int64 [n]; negative ones are ignored. See
        `linear_cross_entropy.linear_cross_entropy`."""
        ...
