"""The flash-attn package as a flash pair (`flash_pair.py`)."""

from typing import Any, Protocol

import torch
from torch import Tensor

from lckv.attention.flash_pair import Gradients, Partial, Problem, require_fitting_heads
from lckv.attention.packed import Packed


class FlashAttnInterface(Protocol):
    """The functions of `flash_attn.flash_attn_interface` (2.7 and newer) that are used here; tensors are [b,
    s, heads, d], of the last two [tokens, heads, d]."""

    def _flash_attn_forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]: ...

    def _flash_attn_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor: ...

    def _flash_attn_varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *bounds: Any, **options: Any
    ) -> tuple[Tensor, ...]: ...

    def _flash_attn_varlen_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor: ...


class FlashAttnPair:
    """The flash-attn package: CUDA; float16 and bfloat16,
    heads of a multiple of 8 and at most 256 channels."""

    def __init__(self, interface: FlashAttnInterface) -> None:
        self._interface = interface

    @staticmethod
    def _options(scale: float, causal: bool) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def forward(self, problem: Problem) -> Partial:
        """See `FlashPair`."""
        require_fitting_heads(problem.query)
        if problem.sequences is not None:
            return self._forward_packed(Packed(problem), problem.scale)
        query, key, value = (tensor.transpose(1, 2) for tensor in problem[:3])
        output, lse, _, random_state = self._interface._flash_attn_forward(
            query, key, value, return_softmax=False, **self._options(problem.scale, problem.causal)
        )
        return Partial(output.transpose(1, 2), lse, (random_state,))

    def _forward_packed(self, packed: Packed, scale: float) -> Partial:
        query, key, value = packed.heads
        of_queries, of_keys, longest_query, longest_key = packed.bounds
        output, lse, _, random_state = self._interface._flash_attn_varlen_forward(
            query, key, value, of_queries, of_keys, longest_query, longest_key,
            return_softmax=False, **self._options(scale, True),
        )  # fmt: skip
        return packed.partial(output, lse, (random_state,))

    def backward(self, gradient: Tensor, problem: Problem, partial: Partial) -> Gradients:
        """See `FlashPair`."""
        if problem.sequences is not None:
            return self._backward_packed(gradient, Packed(problem), partial, problem.scale)
        query, key, value = (tensor.transpose(1, 2) for tensor in problem[:3])
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
        self._interface._flash_attn_backward(
            gradient.transpose(1, 2), query, key, value,
            out=partial.output.transpose(1, 2), softmax_lse=partial.lse.contiguous(), dq=dq, dk=dk, dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=partial.rest[0],
            **self._options(problem.scale, problem.causal),
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _backward_packed(self, gradient: Tensor, packed: Packed, partial: Partial, scale: float) -> Gradients:
        query, key, value = packed.heads
        of_output, output, lse = packed.of_backward(gradient, partial)
        of_queries, of_keys, longest_query, longest_key = packed.bounds
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
        self._interface._flash_attn_varlen_backward(
            of_output, query, key, value,
            out=output, softmax_lse=lse, dq=dq, dk=dk, dv=dv,
            cu_seqlens_q=of_queries, cu_seqlens_k=of_keys,
            max_seqlen_q=longest_query, max_seqlen_k=longest_key,
            deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=partial.rest[0],
            **self._options(scale, True),
        )  # fmt: skip
        return packed.gradients((dq, dk, dv))
