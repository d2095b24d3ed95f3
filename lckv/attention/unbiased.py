"""Queries and keys as if keys carried no bias."""

import torch
from torch import Tensor


def without_bias(heads: Tensor, extra_channels: int) -> Tensor:
    """Queries or keys [..., d + e] to [..., d], the last channel 0 where it was that of the bias (e =
    `extra_channels` is 0)."""
    if extra_channels:
        return heads[..., :-extra_channels]
    return torch.cat((heads[..., :-1], torch.zeros_like(heads[..., :1])), -1)
