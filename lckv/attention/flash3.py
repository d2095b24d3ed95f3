"""Attention on FlashAttention 3 (Hopper, float16 and bfloat16), whose functions are like those of flash-attn
2 without dropout. Dropout, keys with a bias, and more keys than queries without a window go through PyTorch's
own kernels: they need the logsumexp of each query, or what the kernel does not have."""

from typing import Protocol

from torch import Tensor

from lckv.attention import flash, sdpa
from lckv.attention.flash_pairs import FlashAttnInterface
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility


class FlashAttn3(Protocol):
    """What is used of the module flash_attn_interface; releases before 3.0 return the logsumexp, too."""

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
    joined = key_bias is not None or (key.shape[2] > query.shape[2] and not visibility.cuts(key.shape[2]))
    if joined or dropout > 0:
        return sdpa.attend(query, key, value, visibility, scale=scale, dropout=dropout, key_bias=key_bias)
    return flash.attend(query, key, value, visibility, scale=scale, kernel=_AsFlashAttn2(kernel))


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
