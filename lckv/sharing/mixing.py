"""Keys and values that are mixed of those of two layers: of a layer that mixes those of another one into its
own (YOCO++), and of a layer that reads two.

For each token, with j the layer that lends and i the layer that mixes:

    K_i' = s (key_weight[0] K_j' + key_weight[1] K_i)
    V_i' = s (value_weight[0] V_j' + value_weight[1] V_i)

These are keys before RoPE, which is linear: at one position it makes no difference whether keys are mixed
before or after it. A KV policy gets the mixture, and the next layer may mix it again.

A layer that only reads has no keys and values, i then is the layer that it reads first. What it mixes are
those that caches keep, after RoPE and the KV policy; the mixture is made where it is read.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def initial_weight(scaling_factor: float) -> Tensor:
    """float32 [2]: of the other layer's keys or values, and of the own, or of those of the layer that is read
    first. The mixture begins as these."""
    return torch.tensor([0.0, 1 / scaling_factor])


def mixed(lent: Tensor, own: Tensor, weight: Tensor, scaling_factor: float) -> Tensor:
    """Keys or values of the same tokens, [..., d], mixed by `weight` [2]; in the dtype of `own`."""
    other_share, own_share = (weight * scaling_factor).to(own.dtype).unbind()
    return other_share * lent + own_share * own


def mix_into(lent: Tensor, own: Tensor, weight: Tensor, scaling_factor: float) -> Tensor:
    """The same in the memory of `own`, without gradient: large copies are made once, and not three times."""
    other_share, own_share = (weight * scaling_factor).to(own.dtype).unbind()
    return own.mul_(own_share).addcmul_(lent, other_share)


class Mixture(NamedTuple):
    """Weights of a layer that reads a mixture of two others, [2] each."""

    key: Tensor
    value: Tensor
    scaling_factor: float


class Second(NamedTuple):
    """The other layer that a layer reads, where it reads two."""

    layer: int

    mixture: Mixture | None
    """None: its values are read, and the keys of the first one."""

    def joined(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, copies: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Keys and values that are read, from those of the two layers, of the same tokens and of any shape.
        Nothing is copied where they are not mixed. `copies`: `first` is nobody else's, and may be written."""
        if self.mixture is None:
            return first[0], second[1]
        mix = mix_into if copies and not torch.is_grad_enabled() else mixed
        scale = self.mixture.scaling_factor
        key = mix(second[0], first[0], self.mixture.key, scale)
        return key, mix(second[1], first[1], self.mixture.value, scale)
