"""Attention on FlashAttention 3 (Hopper, float16 and bfloat16), whose functions are like those of flash-attn
2 without dropout; with dropout PyTorch's own kernels attend."""

from typing import Any, Protocol

import torch
from torch import Tensor

from lckv.attention import flash, sdpa
from lckv.attention.biased import attend_biased
from lckv.attention.flash_pairs import FlashAttnInterface, Gradients, Partial, require_fitting_heads
from lckv.attention.key_bias import KeyBias
from lckv.attention.last_queries import attend_last
from lckv.attention.visibility import Visibility


class FlashAttn3(Protocol):
    """What is used of the module flash_attn_interface; releases before 3.0 return the logsumexp, too.
    Tensors are [b, s, heads, d]."""

    def _flash_attn_forward(self, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]: ...

    def _flash_attn_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any, deterministic: bool
    ) -> object: ...

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        window_size: tuple[int, int],
    ) -> Tensor | tuple[Tensor, ...]:
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
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        window_size: tuple[int, int],
    ) -> Tensor | tuple[Tensor, ...]:
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
    kernel: FlashAttn3,
) -> Tensor:
    """Same contract as `reference.attend`; `kernel` is the module flash_attn_interface."""
    if dropout > 0:
        return sdpa.attend(query, key, value, visibility, scale=scale, dropout=dropout, key_bias=key_bias)
    pair = FlashAttn3Pair(kernel)
    if key_bias is not None:
        return attend_biased(
            query, key, value, visibility, scale=scale, dropout=dropout, key_bias=key_bias, pair=pair
        )
    if key.shape[2] > query.shape[2] and not visibility.cuts(key.shape[2]):
        return attend_last(query, key, value, visibility, scale=scale, dropout=dropout, pair=pair)
    return flash.attend(query, key, value, visibility, scale=scale, kernel=_AsFlashAttn2(kernel))


_NOT_USED = (None,) * 20
"""Of the forward: new keys and values, the place of the output, lengths, pages, rotation, scales of FP8."""
_ROWS = (None,) * 6
"""Of the backward: lengths of sequences that follow each other."""


class FlashAttn3Pair:
    """FlashAttention 3's two private functions, whose arguments are given by their place, since names differ
    between releases. Heads of a multiple of 8 and at most 256 channels."""

    def __init__(self, kernel: FlashAttn3) -> None:
        self._kernel = kernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Partial:
        """See `FlashPair`."""
        require_fitting_heads(query)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output, lse, *_ = self._kernel._flash_attn_forward(query, key, value, *_NOT_USED, scale, causal)
        return Partial(output.transpose(1, 2), lse)

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        partial: Partial,
        scale: float,
        *,
        causal: bool,
    ) -> Gradients:
        """See `FlashPair`."""
        gradient, query, key, value, output = (
            tensor.transpose(1, 2) for tensor in (gradient, query, key, value, partial.output)
        )
        # each laid out as [b, s, heads, d], which the kernel fills
        gradients = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for tensor in (query, key, value)
        ]
        self._kernel._flash_attn_backward(
            gradient, query, key, value, output, partial.lse.contiguous(), *_ROWS, *gradients, scale, causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        dq, dk, dv = (tensor.transpose(1, 2) for tensor in gradients)
        return dq, dk, dv


class _AsFlashAttn2:
    """Takes the arguments of flash-attn 2: `lckv.attention.flash` knows windows and documents."""

    flash_attn_interface: FlashAttnInterface

    def __init__(self, kernel: FlashAttn3) -> None:
        self._kernel = kernel

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
        """See `flash.FlashAttn`; without dropout."""
        assert dropout_p == 0.0
        return _output(
            self._kernel.flash_attn_func(
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                causal=causal,
                deterministic=deterministic,
                window_size=window_size,
            )
        )

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
        """See `flash.FlashAttn`; without dropout."""
        assert dropout_p == 0.0
        return _output(
            self._kernel.flash_attn_varlen_func(
                q,
                k,
                v,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                softmax_scale=softmax_scale,
                causal=causal,
                deterministic=deterministic,
                window_size=window_size,
            )
        )


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
