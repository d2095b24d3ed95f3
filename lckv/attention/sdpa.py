"""Attention on PyTorch's scaled_dot_product_attention: memory linear in the length, on CPU and CUDA.

Nothing of size length x length is made. A query that must not see itself is one row further down: dropping
the first query and the last key turns "keys < t" into plain causality. A window is walked in chunks of
queries against the slice of keys they can see. Documents are attended together: by kernels that know their
bounds, or in batches of about the same length (`document_batches`).
Keys with a bias: `lckv.attention.biased`; more keys than queries, without window: `last_queries`.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lckv.attention.aten_pairs import choose_pair
from lckv.attention.biased import attend_biased
from lckv.attention.document_batches import attend_in_batches
from lckv.attention.key_bias import KeyBias
from lckv.attention.last_queries import attend_last, within_window
from lckv.attention.visibility import Visibility
from lckv.errors import UnsupportedError

_CHUNK = 256
"""Queries per chunk under a window: a mask has _CHUNK x (window + _CHUNK) entries."""


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
    """Same contract as `reference.attend`."""
    if key_bias is not None:
        pair = choose_pair(query)
        return attend_biased(
            query, key, value, visibility, scale=scale, dropout=dropout, key_bias=key_bias, pair=pair,
            masks=query.device.type == "cpu",
        )  # fmt: skip
    cuts, longer = visibility.cuts(key.shape[2]), key.shape[2] > query.shape[2]
    # PyTorch's own function knows no documents, keeps the output twice where the first query sees nothing,
    # and on a CPU repeats the keys of grouped heads
    needs_pair = visibility.documents is not None or visibility.exclude_self or query.device.type == "cpu"
    by_pair = needs_pair and dropout == 0
    if not cuts and (longer or (by_pair and _has_pair(query))):
        pair = choose_pair(query)
        return attend_last(query, key, value, visibility, scale=scale, dropout=dropout, pair=pair)
    if query.is_cuda and (query.dtype == torch.float32 or visibility.window is not None):
        # no fused CUDA kernel takes grouped heads in float32 or under a mask
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    attend_rows = partial(_one_document, visibility=visibility, scale=scale, dropout=dropout)
    if visibility.documents is None:
        return attend_rows(query, key, value)
    if not longer:
        return attend_in_batches(attend_rows, query, key, value, visibility.documents)
    queries, keys, values, of_seen = within_window(query, key, value, visibility)
    assert of_seen.documents is not None
    return attend_in_batches(attend_rows, queries, keys, values, of_seen.documents)[:, :, -query.shape[2] :]


def _has_pair(query: Tensor) -> bool:
    """Whether there is one, and it does what PyTorch's own function would do here."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(query.device.type):
        return False
    try:
        choose_pair(query)
    except UnsupportedError:
        return False
    return True


def _one_document(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, dropout: float
) -> Tensor:
    if not visibility.exclude_self:
        return _causal(query, key, value, visibility.window, scale, dropout)
    window = None if visibility.window is None else visibility.window - 1
    if key.shape[2] == 1 or window == 0:
        return torch.zeros_like(query)
    blind = int(query.shape[2] == key.shape[2])  # queries that see nothing
    seeing = _causal(query[:, :, blind:], key[:, :, :-1], value[:, :, :-1], window, scale, dropout)
    return pad(seeing, (0, 0, blind, 0)) if blind else seeing


def _causal(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float, dropout: float
) -> Tensor:
    """Token t sees keys t - window + 1 .. t; queries are those of the last tokens."""
    length, older, grouped = query.shape[2], key.shape[2] - query.shape[2], query.shape[1] != key.shape[1]
    if window is None or (window >= length and not older):
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )
    outputs = []
    for start in range(0, length, _CHUNK):
        stop, first = min(start + _CHUNK, length), max(0, older + start - window + 1)
        queries = torch.arange(older + start, older + stop, device=query.device)[:, None]
        keys = torch.arange(first, older + stop, device=query.device)[None, :]
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first : older + stop],
                value[:, :, first : older + stop],
                attn_mask=(keys <= queries) & (keys > queries - window),
                scale=scale,
                dropout_p=dropout,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2)
