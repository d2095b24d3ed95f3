"""Attention on the flash-attn package (CUDA, float16 and bfloat16): windows and documents inside the kernel.

The package is an argument, not an import, so that the index arithmetic here
is tested where it is not installed.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.biased import attend_biased
from lckv.attention.flash_attn_pair import FlashAttnInterface, FlashAttnPair
from lckv.attention.key_bias import KeyBias
from lckv.attention.last_queries import attend_last, within_window
from lckv.attention.sequences import sequences_of
from lckv.attention.visibility import Documents, Visibility


class FlashAttn(Protocol):
    """What is used of the flash-attn package."""

    flash_attn_interface: FlashAttnInterface

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        """Attention over rows of equal length, [b, s, heads, d]."""
        ...

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        """Attention over sequences of different lengths, one after the other in [tokens, heads, d]."""
        ...


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    key_bias: KeyBias | None = None,
    kernel: FlashAttn,
) -> Tensor:
    """Same contract as `reference.attend`; `kernel` is the flash_attn module."""
    if key_bias is not None:
        pair = FlashAttnPair(kernel.flash_attn_interface)
        return attend_biased(
            query, key, value, visibility, scale=scale, dropout=dropout, key_bias=key_bias, pair=pair
        )
    seen = None if visibility.window is None else visibility.window - visibility.exclude_self
    if seen == 0 or (visibility.exclude_self and key.shape[2] == 1):
        return torch.zeros_like(query)
    if key.shape[2] > query.shape[2]:
        if not visibility.cuts(key.shape[2]):
            pair = FlashAttnPair(kernel.flash_attn_interface)
            return attend_last(query, key, value, visibility, scale=scale, dropout=dropout, pair=pair)
        seen_by_last = within_window(query, key, value, visibility)
        return attend(*seen_by_last, scale=scale, dropout=dropout, kernel=kernel)[:, :, -query.shape[2] :]
    # flash-attn counts a window's keys to the left of the diagonal, without the diagonal itself
    options = {
        "dropout_p": dropout,
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "window_size": (-1 if seen is None else seen - 1, 0),
    }
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if visibility.documents is not None:
        output = _documents(query, key, value, visibility.documents, visibility.exclude_self, kernel, options)
    elif visibility.exclude_self:
        older = kernel.flash_attn_func(query[:, 1:], key[:, :-1], value[:, :-1], **options)  # type: ignore[arg-type]
        output = pad(older, (0, 0, 0, 0, 1, 0))
    else:
        output = kernel.flash_attn_func(query, key, value, **options)  # type: ignore[arg-type]
    return output.transpose(1, 2)


def _documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    exclude_self: bool,
    kernel: FlashAttn,
    options: dict[str, object],
) -> Tensor:
    """[b, s, heads, d] in and out. Excluding self, each query stands in the place of the one before."""
    rows, length = query.shape[:2]
    # all rows as one, so that the first query of a row stands in the place of the last of the row before
    query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    behind = int(exclude_self)
    sequences = sequences_of(documents, len(query), behind)
    output = kernel.flash_attn_varlen_func(
        query[behind:],
        key[: len(key) - behind],
        value[: len(key) - behind],
        cu_seqlens_q=sequences.cu_seqlens,
        cu_seqlens_k=sequences.cu_seqlens,
        max_seqlen_q=sequences.longest,
        max_seqlen_k=sequences.longest,
        **options,  # type: ignore[arg-type]
    )
    if sequences.closed is not None:
        output = output.index_fill(0, sequences.closed, 0.0)
    if behind:
        output = pad(output, (0, 0, 0, 0, behind, 0))
    return output.unflatten(0, (rows, length))
