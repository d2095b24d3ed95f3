"""Flash attention, causal or full, as a forward that also returns the logsumexp of each query's scores, and
its backward.

A backward computes probabilities as exp(score - lse) and subtracts the row sum of gradient times output.
Given the lse and the output of a larger softmax, of which this attention is one part, it returns this part's
gradients: ring attention is built on that, and so is attention with biased keys (`lckv.attention.biased`).

Shapes: query, output and gradient [b, h, q, d], key and value [b, g, k, d] with h a multiple of g, lse [b, h,
q] in float32, or in float64 for float64 queries. Where attention is causal, q = k.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lckv.attention.head_sizes import obstacle_to_biased_keys
from lckv.attention.sequences import Sequences
from lckv.errors import UnsupportedError


class Problem(NamedTuple):
    """Attention without dropout: query i sees keys 0 .. i of as many, or, where it is not causal, all keys,
    of which there is at least one."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool
    sequences: Sequences | None = None
    """Where it is causal, which tokens see each other; None: those of a row. A query that is closed has
    output 0 and the lse `CLOSED`; its backward adds nothing to any gradient, whatever lse and output are
    said to be."""


class Partial(NamedTuple):
    """What a forward returns: attention to some of the keys."""

    output: Tensor
    lse: Tensor
    rest: tuple[Any, ...] = ()
    """What the backward wants back besides these."""


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value, in their shapes."""


class FlashPair(Protocol):
    """Kernels that solve a problem and give its gradients."""

    def forward(self, problem: Problem) -> Partial:
        """Output and lse."""
        ...

    def backward(self, gradient: Tensor, problem: Problem, partial: Partial) -> Gradients:
        """Gradients of query, key and value from that of the output."""
        ...


def require_fitting_heads(query: Tensor) -> None:
    """Raises UnsupportedError where kernels of a GPU do not take as many channels as `query` has."""
    channels = query.shape[-1]
    obstacle = obstacle_to_biased_keys(channels, float32=query.element_size() == 4)
    if obstacle is not None:
        raise UnsupportedError(f"flash attention in heads of {channels} channels", obstacle)
