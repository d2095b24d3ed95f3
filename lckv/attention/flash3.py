"""Attention on FlashAttention 3 (Hopper, float16 and bfloat16), whose functions are like those of flash-attn
2 without dropout; with dropout PyTorch's own kernels attend."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lckv.attention import flash, sdpa
from lckv.attention.biased import attend_biased
from lckv.attention.flash_attn_pair import FlashAttnInterface
from lckv.attention.flash_pair import Gradients, Partial, Problem, require_fitting_heads
from lckv.attention.key_bias import KeyBias
from lckv.attention.last_queries import attend_last
from lckv.attention.packed import Bounds, Packed
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


def _of_forward(bounds: Bounds | None) -> tuple[Any, ...]:
    """Arguments 4 to 23: new keys and values, the place of the output, bounds of sequences, their longest,
    pages, rotation, scales of FP8."""
    if bounds is None:
        return (None,) * 20
    return (*(None,) * 4, *bounds[:2], *(None,) * 3, *bounds[2:], *(None,) * 9)


def _of_backward(bounds: Bounds | None) -> tuple[Any, ...]:
    """Arguments 7 to 12: bounds of sequences, their lengths where these are less, their longest."""
    return (None,) * 6 if bounds is None else (*bounds[:2], None, None, *bounds[2:])


class FlashAttn3Pair:
    """FlashAttention 3's two private functions, whose arguments are given by their place, since names differ
    between releases. Heads of a multiple of 8 and at most 256 channels."""

    def __init__(self, kernel: FlashAttn3) -> None:
        self._kernel = kernel

    def forward(self, problem: Problem) -> Partial:
        """See `FlashPair`."""
        require_fitting_heads(problem.query)
        if problem.sequences is not None:
            packed = Packed(problem)
            output, lse, *_ = self._kernel._flash_attn_forward(
                *packed.heads, *_of_forward(packed.bounds), problem.scale, True
            )
            return packed.partial(output, lse, ())
        heads = (tensor.transpose(1, 2) for tensor in problem[:3])
        output, lse, *_ = self._kernel._flash_attn_forward(
            *heads, *_of_forward(None), problem.scale, problem.causal
        )
        return Partial(output.transpose(1, 2), lse)

    def backward(self, gradient: Tensor, problem: Problem, partial: Partial) -> Gradients:
        """See `FlashPair`."""
        if problem.sequences is not None:
            packed = Packed(problem)
            of_output, output, lse = packed.of_backward(gradient, partial)
            return packed.gradients(
                self._backward(of_output, packed.heads, output, lse, packed.bounds, problem.scale, True)
            )
        of_output, output, *heads = (
            tensor.transpose(1, 2) for tensor in (gradient, partial.output, *problem[:3])
        )
        lse = partial.lse.contiguous()
        parts = self._backward(of_output, heads, output, lse, None, problem.scale, problem.causal)
        dq, dk, dv = (part.transpose(1, 2) for part in parts)
        return dq, dk, dv

    def _backward(
        self,
        gradient: Tensor,
        heads: Sequence[Tensor],
        output: Tensor,
        lse: Tensor,
        bounds: Bounds | None,
        scale: float,
        causal: bool,
    ) -> Gradients:
        """In the kernel's layout."""
        # the kernel fills what is laid out as [b, s, heads, d]
        dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in heads)
        self._kernel._flash_attn_backward(
            gradient, *heads, output, lse, *_of_backward(bounds), dq, dk, dv, scale, causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
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
