"""Kernels of GPUs on PyTorch's CPU kernels: with their arguments, layouts and what they do not take."""

import types
from typing import Any

import torch
from torch import Tensor

from lckv.attention import reference
from lckv.attention.aten_pairs import AtenCPU
from lckv.attention.flash_pair import Partial, Problem
from lckv.attention.visibility import Visibility


def flash_attn() -> types.SimpleNamespace:
    """flash-attn's functions as its documentation defines them, in plain PyTorch: [.., heads, d], window
    counted to the left of the diagonal, documents by cu_seqlens."""

    def rows(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        window_size: tuple,
    ) -> Tensor:
        assert causal
        assert q.shape[1] == k.shape[1]
        assert not deterministic
        assert window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        parts = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return reference.attend(*parts, Visibility(window=window), scale=softmax_scale).transpose(1, 2)

    def packed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **options: object,
    ) -> Tensor:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        lengths = cu_seqlens_q.diff()
        assert lengths.max() == max_seqlen_q == max_seqlen_k
        assert cu_seqlens_q[-1] == len(q)
        pieces = [tensor.split(lengths.tolist()) for tensor in (q, k, v)]
        done = [
            rows(*(piece[None] for piece in one), **options)[0]
            for one in zip(*pieces, strict=True)
            if len(one[0])
        ]
        return torch.cat(done)

    return types.SimpleNamespace(
        flash_attn_func=rows, flash_attn_varlen_func=packed, flash_attn_interface=FlashAttnInterfaceStandIn()
    )


def flash_attn_3() -> types.SimpleNamespace:
    """FlashAttention 3's: the same without dropout. The second gives two results, as older releases,
    and arguments of the private ones have places."""
    two = flash_attn()

    def rows(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return two.flash_attn_func(q, k, v, dropout_p=0.0, **options)

    def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        return two.flash_attn_varlen_func(q, k, v, dropout_p=0.0, **options), None

    def forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
        *between, scale, causal = others
        bounds = [between.pop(place) for place in (10, 9, 5, 4)][::-1]
        assert between == [None] * 16
        if bounds[0] is not None:
            assert causal
            return *varlen_forward(q, k, v, *bounds, scale=scale), torch.empty(0), torch.empty(0)
        assert bounds == [None] * 4
        assert not causal or q.shape[1] == k.shape[1]
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        attended = AtenCPU().forward(Problem(*heads, scale, causal=causal))
        return attended.output.transpose(1, 2), attended.lse, torch.empty(0), torch.empty(0)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: Any,
        deterministic: bool,
    ) -> Tensor:  # fmt: skip
        *bounds, dq, dk, dv, scale, causal = others
        assert (bounds.pop(3), bounds.pop(2)) == (None, None)
        assert deterministic is False
        if bounds[0] is not None:
            assert causal
            gradients = varlen_backward(dout, q, k, v, out, lse, *bounds, scale=scale)
            for place, gradient in zip((dq, dk, dv), gradients, strict=True):
                place.copy_(gradient)
            return torch.empty(0)
        assert bounds == [None] * 4
        assert all(tensor.is_contiguous() for tensor in (lse, dq, dk, dv))
        gradient, *tensors = (tensor.transpose(1, 2) for tensor in (dout, q, k, v))
        whole = Partial(out.transpose(1, 2), lse)
        gradients = AtenCPU().backward(gradient, Problem(*tensors, scale, causal), whole)
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(gradient.transpose(1, 2))
        return torch.empty(0)

    return types.SimpleNamespace(
        flash_attn_func=rows,
        flash_attn_varlen_func=packed,
        _flash_attn_forward=forward,
        _flash_attn_backward=backward,
    )


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, scale: float) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: output [t, h, d] and lse [h, t] of heads [t, heads, d]."""
    pieces = [
        AtenCPU().forward(Problem(*heads, scale, causal=True)) for heads in sequences_in((q, k, v), *bounds)
    ]
    output = torch.cat([piece.output[0].transpose(0, 1) for piece in pieces])
    return output, torch.cat([piece.lse[0] for piece in pieces], 1)


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *bounds: Any, scale: float
) -> list[Tensor]:
    """Gradients of q, k and v, sequence by sequence."""
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    parts = []
    for gradient, *heads, output, of_lse in sequences_in((dout, q, k, v, out, lse.T[..., None]), *bounds):
        whole = Partial(output, of_lse[..., 0])
        parts.append(AtenCPU().backward(gradient, Problem(*heads, scale, causal=True), whole))
    return [torch.cat([part[0].transpose(0, 1) for part in of_one]) for of_one in zip(*parts, strict=True)]


def sequences_in(tensors: Any, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int) -> Any:
    """Of tensors [t, heads, d], each [1, heads, tokens, d]."""
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    assert cu_q[0] == 0
    assert cu_q[-1] == len(tensors[0])
    lengths = cu_q.diff().tolist()
    assert min(lengths) > 0
    assert max(lengths) == longest_q == longest_k
    parts = (tensor.transpose(0, 1)[None].split(lengths, 2) for tensor in tensors)
    return zip(*parts, strict=True)


class FlashAttnInterfaceStandIn:
    """flash-attn's two private functions, [b, s, heads, d], on PyTorch's CPU kernels."""

    EXPECTED = types.MappingProxyType(
        {
            "dropout_p": 0.0,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
        }
    )

    def _flash_attn_forward(self, q, k, v, *, softmax_scale, causal, return_softmax, **options):
        assert options == self.EXPECTED
        assert return_softmax is False
        assert not causal or q.shape[1] == k.shape[1]
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        attended = AtenCPU().forward(Problem(*heads, softmax_scale, causal=causal))
        return attended.output.transpose(1, 2), attended.lse, None, torch.tensor([3, 4])

    def _flash_attn_varlen_forward(self, q, k, v, *bounds, softmax_scale, causal, return_softmax, **options):
        assert options == self.EXPECTED
        assert (causal, return_softmax) == (True, False)
        output, lse = varlen_forward(q, k, v, *bounds, scale=softmax_scale)
        return output, lse, None, torch.tensor([3, 4])

    def _flash_attn_varlen_backward(
        self, dout, q, k, v, *, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, softmax_scale, causal, deterministic, rng_state, **options,
    ):  # fmt: skip
        assert options == self.EXPECTED
        assert (causal, deterministic, rng_state.tolist()) == (True, False, [3, 4])
        bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        gradients = varlen_backward(dout, q, k, v, out, softmax_lse, *bounds, scale=softmax_scale)
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(gradient)

    def _flash_attn_backward(
        self,
        dout,
        q,
        k,
        v,
        *,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        softmax_scale,
        causal,
        deterministic,
        rng_state,
        **options,
    ):
        assert options == self.EXPECTED
        assert deterministic is False
        assert rng_state.tolist() == [3, 4]
        assert softmax_lse.is_contiguous()
        gradient, *tensors = (tensor.transpose(1, 2) for tensor in (dout, q, k, v))
        whole = Partial(out.transpose(1, 2), softmax_lse)
        gradients = AtenCPU().backward(gradient, Problem(*tensors, softmax_scale, causal), whole)
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(gradient.transpose(1, 2))


class CudaStandIn:
    """PyTorch's two CUDA kernels, with their argument orders and layouts, on its CPU kernel."""

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
        assert (dropout_p, return_debug_mask) == (0.0, False)
        assert not is_causal or q.shape[2] == k.shape[2]
        attended = AtenCPU().forward(Problem(q, k, v, scale, causal=is_causal))
        return attended.output, attended.lse, None, None, q.shape[2], k.shape[2], "seed", "offset", None

    def _scaled_dot_product_flash_attention_backward(
        self,
        grad,
        q,
        k,
        v,
        out,
        lse,
        cum_q,
        cum_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        seed,
        offset,
        *,
        scale,
    ):
        assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, q.shape[2], k.shape[2], 0.0)
        assert (seed, offset) == ("seed", "offset")
        assert lse.is_contiguous()
        return AtenCPU().backward(grad, Problem(q, k, v, scale, is_causal), Partial(out, lse))

    def _flash_attention_forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale
    ):
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, True, False)
        output, lse = varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale)
        return output, lse, "state", "unused", None

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, state, unused, *, scale
    ):
        assert (dropout_p, is_causal, state, unused) == (0.0, True, "state", "unused")
        return varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale=scale)

    def _scaled_dot_product_efficient_attention(
        self, q, k, v, bias, compute_lse, dropout_p, is_causal, *, scale
    ):
        assert (bias, compute_lse, dropout_p) == (None, True, 0.0)
        assert k.shape == v.shape
        assert q.shape[:2] == k.shape[:2]
        assert not is_causal or q.shape == k.shape
        attended = AtenCPU().forward(Problem(q, k, v, scale, causal=is_causal))
        padded = torch.nn.functional.pad(attended.lse, (0, -q.shape[2] % 32), value=torch.inf)
        return attended.output, padded, "seed", "offset"

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, q, k, v, bias, out, lse, seed, offset, dropout_p, mask, is_causal, *, scale
    ):
        assert (bias, seed, offset, dropout_p) == (None, "seed", "offset", 0.0)
        assert mask == [True, True, True, False]
        assert lse.shape[2] % 32 == 0
        assert (lse[..., q.shape[2] :] == torch.inf).all()
        assert lse.is_contiguous()
        assert out.is_contiguous()
        whole = Partial(out, lse[..., : q.shape[2]])
        return *AtenCPU().backward(grad, Problem(q, k, v, scale, is_causal), whole), None
