"""Causal attention of the last queries of a sequence to all of its keys, on a pair of flash kernels.

Keys may be n longer than queries. Then every query sees the first n keys, and the rest of the keys causally:

    keys     0 1 2 3 4
    query 0  p p o             p: the past, the first n = 2 keys, a full rectangle
    query 1  p p o o           o: own keys, as many as queries
    query 2  p p o o o

The two softmaxes are joined by their lse. Each part's backward is given the output and the lse of the whole
softmax and so returns exactly the gradients through its own keys. No kernel is asked how it aligns a causal
rectangle, on which kernels differ. The kernels make the products of queries and keys that are drawn, no more.

Shapes: query [b, h, q, d + e], key [b, g, n + q, d + e], value [b, g, n + q, d], output and its gradient [b,
h, q, d], lse [b, h, q].
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.flash_pairs import FlashPair, Gradients, Partial

Rest = tuple[Any, ...]
"""What a backward wants back."""


class Causal(NamedTuple):
    """Attention of query i to keys 0 .. n + i. Values may have fewer channels than keys, which kernels do not
    take: they get zeros."""

    pair: FlashPair
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Output and lse."""
        past = key.shape[2] - query.shape[2]
        wide = widened(value, key)
        own = self.pair.forward(query, key[:, :, past:], wide[:, :, past:], self.scale, causal=True)
        rests: Rest = (own.rest, None)
        if past:
            older = self.pair.forward(query, key[:, :, :past], wide[:, :, :past], self.scale, causal=False)
            join(own.output, own.lse, older.output, older.lse)
            rests = (own.rest, older.rest)
        return Partial(own.output[..., : value.shape[-1]], own.lse, rests)

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of query, key and value from that of the output of the whole softmax."""
        past = key.shape[2] - query.shape[2]
        own_rest, older_rest = whole.rest
        wide, gradient = widened(value, key), widened(gradient, key)
        whole = whole._replace(output=widened(whole.output, key), rest=own_rest)
        dq, dk, dv = self.pair.backward(
            gradient, query, key[:, :, past:], wide[:, :, past:], whole, self.scale, causal=True
        )
        if past:
            whole = whole._replace(rest=older_rest)
            older = self.pair.backward(
                gradient, query, key[:, :, :past], wide[:, :, :past], whole, self.scale, causal=False
            )
            dq += older[0]
            dk, dv = (torch.cat(parts, 2) for parts in zip(older[1:], (dk, dv), strict=True))
        return dq, dk, dv[..., : value.shape[-1]]


class Full(NamedTuple):
    """Attention of every query to all keys, else as `Causal`."""

    pair: FlashPair
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Output and lse."""
        partial = self.pair.forward(query, key, widened(value, key), self.scale, causal=False)
        return partial._replace(output=partial.output[..., : value.shape[-1]])

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of query, key and value from that of the output of the whole softmax."""
        whole = whole._replace(output=widened(whole.output, key))
        dq, dk, dv = self.pair.backward(
            widened(gradient, key), query, key, widened(value, key), whole, self.scale, causal=False
        )
        return dq, dk, dv[..., : value.shape[-1]]


def join(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make `output` [..., s, d] and `lse` [..., s] those of their keys and the other's."""
    share = torch.sigmoid(other_lse - lse)[..., None].to(output.dtype)
    output.lerp_(other, share)
    torch.logaddexp(lse, other_lse, out=lse)


def widened(tensor: Tensor, like: Tensor) -> Tensor:
    """[..., d] to [..., d + e], with zeros, e as in `like`."""
    extra = like.shape[-1] - tensor.shape[-1]
    return pad(tensor, (0, extra)) if extra else tensor
