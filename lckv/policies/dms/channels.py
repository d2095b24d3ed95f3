"""Where decisions are read, the borrowed channel, which is the last of the first query head of each group, or
an adapter; and the channels that queries and keys get for the bias.

Shapes: s tokens, b rows, h query heads, g KV heads, d channels of a head.
"""

import torch
from torch import Tensor

from lckv.policies.base import Rotate
from lckv.policies.dms.config import EXTRA_CHANNELS


def decision_logits(read: Tensor, kv_heads: int, scale: float, offset: float) -> Tensor:
    """x, float32 [s, b, g]: above 0 where the token before is to be dropped, from queries [s, b, h, d] before
    RoPE, or an adapter's numbers [s, b, g, 1]."""
    first = read.unflatten(2, (kv_heads, -1))[:, :, :, 0, -1]
    return scale * first.float() - offset


def of_first_head(of_heads: Tensor) -> Tensor:
    """[s, b, g], the first head's for all."""
    return of_heads[..., :1].expand_as(of_heads)


def scaled_around(rotate: Rotate, query: Tensor, kv_heads: int, factor: float) -> Tensor:
    """Queries [s, b, h, d] rotated, with the borrowed channel times `factor` before and after."""
    if factor == 1.0:
        return rotate(query)
    factors = torch.ones(query.shape[2:], dtype=query.dtype, device=query.device)
    factors.view(kv_heads, -1, query.shape[3])[:, 0, -1] = factor
    return rotate(query * factors) * factors


def widened(heads: Tensor, last: Tensor | float) -> Tensor:
    """[s, b, heads, d] to [s, b, heads, d + e], with `last` (a number, or [s, b, heads]) in the last channel
    and 0 in the others that are new."""
    extra = heads.new_zeros(*heads.shape[:3], EXTRA_CHANNELS)
    extra[..., -1] = last
    return torch.cat((heads, extra), -1)
