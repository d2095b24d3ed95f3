"""A problem with sequences for kernels that take them one after the other, with their bounds (varlen).

Closed sequences are attended like others. Their output is dropped, and in backward their lse is infinite,
with which kernels fill up what is no query: probabilities are then exactly 0, and so is all that is added to
gradients.

Shapes: as in `lckv.attention.flash_pair`; here t = b q tokens, heads [t, heads, d], lse [h, t].
"""

from typing import Any

import torch
from torch import Tensor

from lckv.attention.flash_pair import Gradients, Partial, Problem
from lckv.attention.sequences import CLOSED

Bounds = tuple[Tensor, Tensor, int, int]
"""cu_seqlens int32 [n + 1] of queries and of keys, and the longest sequence of each."""


class Packed:
    """A causal problem with sequences."""

    def __init__(self, problem: Problem) -> None:
        assert problem.causal
        assert problem.sequences is not None
        self._sequences, self._rows = problem.sequences, len(problem.query)
        self.heads = tuple(map(_tokens, problem[:3]))
        """Query, key and value, [t, heads, d]."""

    @property
    def bounds(self) -> Bounds:
        """Those of queries and keys alike."""
        cu_seqlens, longest = self._sequences.cu_seqlens, self._sequences.longest
        return cu_seqlens, cu_seqlens, longest, longest

    def partial(self, output: Tensor, lse: Tensor, rest: tuple[Any, ...]) -> Partial:
        """What a forward returned, of [t, h, d] and [h, t]."""
        self._sequences.close(output, 0.0)
        self._sequences.close(lse.transpose(0, 1), CLOSED)
        return Partial(self._of_rows(output), lse.unflatten(1, (self._rows, -1)).transpose(0, 1), rest)

    def of_backward(self, gradient: Tensor, partial: Partial) -> tuple[Tensor, Tensor, Tensor]:
        """What a backward takes: the gradient of the output and the output [t, h, d], lse [h, t]."""
        lse = partial.lse.transpose(0, 1).flatten(1)  # [b, h, q] to [h, t]
        if self._sequences.closed is not None:
            lse = lse.index_fill(1, self._sequences.closed, torch.inf)
        return _tokens(gradient), _tokens(partial.output), lse.contiguous()

    def gradients(self, gradients: Gradients) -> Gradients:
        """What a backward returned."""
        dq, dk, dv = map(self._of_rows, gradients)
        return dq, dk, dv

    def _of_rows(self, tokens: Tensor) -> Tensor:
        """[t, heads, d] to [b, heads, q, d]."""
        return tokens.unflatten(0, (self._rows, -1)).transpose(1, 2)


def _tokens(rows: Tensor) -> Tensor:
    """[b, heads, q, d] to [t, heads, d]; a view of one row."""
    return rows.transpose(1, 2).flatten(0, 1)
