"""Keys and values of a layer that mixes those of another one into its own (YOCO++).

For each token, with j the layer that lends and i the layer that mixes:

    K_i' = s (key_weight[0] K_j' + key_weight[1] K_i)
    V_i' = s (value_weight[0] V_j' + value_weight[1] V_i)

These are keys before RoPE, which is linear: at one position it makes no difference whether keys are mixed
before or after it. A KV policy gets the mixture, and the next layer may mix it again.
"""

import torch
from torch import Tensor


def initial_weight(scaling_factor: float) -> Tensor:
    """float32 [2]: of the other layer's keys or values, and of the own. The mixture begins as the own."""
    return torch.tensor([0.0, 1 / scaling_factor])


def mixed(lent: Tensor, own: Tensor, weight: Tensor, scaling_factor: float) -> Tensor:
    """Keys or values of the same tokens, [..., d], mixed by `weight` [2]; in the dtype of `own`."""
    other_share, own_share = (weight * scaling_factor).to(own.dtype).unbind()
    return other_share * lent + own_share * own
