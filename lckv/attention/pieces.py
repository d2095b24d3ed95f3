"""What the two ways of attention to keys with a bias (`frontier.py`, `band.py`) have in common.

Shapes: as in `lckv.attention.biased`.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.flash_pairs import FlashPair, Gradients, Partial


class Piece(NamedTuple):
    """Tokens that attend to each other: query i of `queries` sees keys 0 ..
    i of `keys`, as many as there are queries."""

    rows: slice
    queries: slice
    keys: slice

    def of_queries(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The piece's part [rows, h, s, ...] of tensors [b, h, s, ...]."""
        return tuple(tensor[self.rows, :, self.queries] for tensor in tensors)

    def of_keys(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The piece's part [rows, g, s, ...] of tensors [b, g, s, ...]."""
        return tuple(tensor[self.rows, :, self.keys] for tensor in tensors)


class Biased(NamedTuple):
    """The part of the keys that are seen with their bias, whose kernel wants values as wide as keys."""

    pair: FlashPair
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Causal attention, output [b, h, s, d]."""
        partial = self.pair.forward(query, key, widened(value, key), self.scale)
        return partial._replace(output=partial.output[..., : value.shape[-1]])

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Partial
    ) -> Gradients:
        """Gradients of query, key and value from that of the output of the whole softmax."""
        whole = whole._replace(output=widened(whole.output, key))
        dq, dk, dv = self.pair.backward(
            widened(gradient, key), query, key, widened(value, key), whole, self.scale
        )
        return dq, dk, dv[..., : value.shape[-1]]


def widened(tensor: Tensor, like: Tensor) -> Tensor:
    """[..., d] to [..., d + e], with zeros, e as in `like`."""
    extra = like.shape[-1] - tensor.shape[-1]
    return pad(tensor, (0, extra)) if extra else tensor


def grouped(heads: Tensor, like: Tensor) -> Tensor:
    """[b, h, ...] to [b, g, h / g, ...], g as in `like` [b, g, ...]."""
    return heads.unflatten(1, (like.shape[1], -1))


Rest = tuple[Any, ...]
"""What a pair's backward wants back."""
