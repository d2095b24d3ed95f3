"""Attention to several groups of keys as if they were one, where queries may look differently to each group.

Shapes: b rows, h query heads, g KV heads, q queries, n keys of a group, d channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """A group of keys."""

    query: Tensor
    """[b, h, q, d]: as these keys see them."""

    key: Tensor
    """[b, g, n, d]."""

    value: Tensor
    """[b, g, n, d]."""

    seen: Tensor
    """bool [b, q, n]."""


def attend_parts(parts: Sequence[Part], scale: float) -> Tensor:
    """softmax(scale * query key^T) value over the keys of all parts that are seen, 0 for a query that sees
    none; as `query`. Softmax is float32."""
    scores = torch.cat([_scores(part, scale) for part in parts], -1)
    peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - peak).exp_()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    shares = weights.to(parts[0].value.dtype).split([part.key.shape[2] for part in parts], -1)
    mixed = [_of_group(share, part.value) @ part.value for share, part in zip(shares, parts, strict=True)]
    return sum(mixed[1:], start=mixed[0]).view(parts[0].query.shape)


def _scores(part: Part, scale: float) -> Tensor:
    """float32 [b, h, q, n]."""
    scores = _of_group(part.query, part.key) @ part.key.transpose(-1, -2)
    scores = scores.view(*part.query.shape[:3], part.key.shape[2]).float() * scale
    return scores.masked_fill_(~part.seen[:, None], -torch.inf)


def _of_group(heads: Tensor, like: Tensor) -> Tensor:
    """[b, h, q, c] to [b, g, h / g * q, c]."""
    return heads.reshape(len(heads), like.shape[1], -1, heads.shape[-1])
