"""Attention as the formula says it, with the whole score matrix in memory:
the oracle of every other backend."""

import torch
from torch import Tensor

from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility


def visible(length: int, rows: int, visibility: Visibility, device: torch.device) -> Tensor:
    """Which key each query sees: bool [rows or 1, length (query), length (key)]."""
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    seen = (key < query) if visibility.exclude_self else (key <= query)
    if visibility.window is not None:
        seen = seen & (key > query - visibility.window)
    if visibility.documents is None:
        return seen[None]
    starts = torch.zeros(rows * length, dtype=torch.int64, device=device)
    starts.index_fill_(0, visibility.documents.cu_seqlens[:-1].long(), 1)
    document = starts.cumsum(0).view(rows, length)
    return seen & (document[:, :, None] == document[:, None, :])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    key_bias: KeyBias | None = None,
) -> Tensor:
    """softmax(scale * query key^T) value over the visible keys; 0 for a query that sees none.

    query [b, h, q, d + e], key [b, g, s, d + e] and value [b, g, s, d] with q <= s, h a multiple of g (query
    head i reads head i * g // h) and e the extra channels of `key_bias`; result [b, h, q, d]. Scores are
    float32. Queries are those of the last q tokens of a row, keys those of all s; `visibility.documents` are
    documents of s tokens. `key_bias`: the last channel carries a bias of the key, which counts for queries
    that are at least `key_bias.first_biased` places behind it."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    length, older = key.shape[2], key.shape[2] - query.shape[2]
    seen = visible(length, query.shape[0], visibility, query.device)[:, None, older:]
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if key_bias is not None:
        place = torch.arange(length, device=query.device)
        biased = place[older:, None] - place >= key_bias.first_biased(exclude_self=visibility.exclude_self)
        unbiased = (query[..., :-1] @ key[..., :-1].transpose(-1, -2)).float() * scale
        scores = torch.where(biased, scores, unbiased)
    lowest = torch.finfo(scores.dtype).min
    probabilities = torch.softmax(scores.masked_fill(~seen, lowest), dim=-1).masked_fill(~seen, 0.0)
    probabilities = torch.nn.functional.dropout(probabilities, dropout)
    return probabilities.to(value.dtype) @ value
