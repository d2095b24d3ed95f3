"""PyTorch's own kernels as flash pairs (`flash_pair.py`), called by the names of their operators."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.document_batches import backward_in_batches, forward_in_batches
from lckv.attention.flash_pair import FlashPair, Gradients, Partial, Problem, require_fitting_heads
from lckv.attention.packed import Packed
from lckv.errors import UnsupportedError

_ATEN = torch.ops.aten


def choose_pair(query: Tensor) -> FlashPair:
    """PyTorch's own kernels for tensors like `query`. Raises UnsupportedError where there are none."""
    if query.device.type == "cpu":
        return AtenCPU()
    require_fitting_heads(query)
    if query.dtype in (torch.float16, torch.bfloat16):
        return AtenFlash()
    if query.dtype == torch.float32:
        return AtenEfficient()
    obstacle = f"on {query.device.type} it takes float16, bfloat16 and float32"
    raise UnsupportedError(f"flash attention in {query.dtype}", obstacle)


class AtenCPU:
    """CPU; float16, bfloat16, float32 and float64."""

    def forward(self, problem: Problem, mask: Tensor | None = None) -> Partial:
        """See `FlashPair`. `mask`: what is added to scores, [b or 1, h or 1, q, k] in float32 or the dtype of
        queries, where as many heads have queries as keys and a row is one sequence."""
        if problem.sequences is not None:
            return forward_in_batches(self, problem)
        folded, query = _fold(problem), problem.query
        output, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            *folded, 0.0, problem.causal, attn_mask=mask, scale=problem.scale
        )
        return Partial(output.reshape(query.shape), lse.reshape(query.shape[:-1]))

    def backward(
        self, gradient: Tensor, problem: Problem, partial: Partial, mask: Tensor | None = None
    ) -> Gradients:
        """See `FlashPair`; `mask` is that of the forward."""
        if problem.sequences is not None:
            return backward_in_batches(self, gradient, problem, partial)
        folded = _fold(problem)
        gradient, output, lse = (
            tensor.reshape(*folded[0].shape[:3], *tensor.shape[3:])
            for tensor in (gradient, partial.output, partial.lse)
        )
        gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, *folded, output, lse, 0.0, problem.causal, attn_mask=mask, scale=problem.scale
        )
        return _unfold(gradients, problem)


class AtenFlash:
    """CUDA; float16 and bfloat16, heads of a multiple of 8 and at most 256 channels."""

    def forward(self, problem: Problem) -> Partial:
        """See `FlashPair`."""
        if problem.sequences is not None:
            packed = Packed(problem)
            output, lse, *rest, _ = _ATEN._flash_attention_forward(
                *packed.heads, *packed.bounds, 0.0, True, False, scale=problem.scale
            )
            return packed.partial(output, lse, tuple(rest))
        output, lse, *rest, _ = _ATEN._scaled_dot_product_flash_attention(
            *problem[:3], 0.0, problem.causal, False, scale=problem.scale
        )
        return Partial(output, lse, tuple(rest))

    def backward(self, gradient: Tensor, problem: Problem, partial: Partial) -> Gradients:
        """See `FlashPair`."""
        if problem.sequences is not None:
            packed = Packed(problem)
            of_output, output, lse = packed.of_backward(gradient, partial)
            gradients = _ATEN._flash_attention_backward(
                of_output, *packed.heads, output, lse, *packed.bounds, 0.0, True, *partial.rest,
                scale=problem.scale,
            )  # fmt: skip
            return packed.gradients(gradients)
        *lengths, seed, offset = partial.rest
        return _ATEN._scaled_dot_product_flash_attention_backward(
            gradient, *problem[:3], partial.output, partial.lse.contiguous(), *lengths, 0.0, problem.causal,
            seed, offset, scale=problem.scale,
        )  # fmt: skip


class AtenEfficient:
    """CUDA; float32."""

    def forward(self, problem: Problem) -> Partial:
        """See `FlashPair`."""
        if problem.sequences is not None:
            return forward_in_batches(self, problem)
        query = problem.query
        output, lse, *rest = _ATEN._scaled_dot_product_efficient_attention(
            *_fold(problem), None, True, 0.0, problem.causal, scale=problem.scale
        )
        lse = lse[..., : query.shape[2]]  # the kernel pads rows to its block
        return Partial(output.reshape(query.shape), lse.reshape(query.shape[:-1]), tuple(rest))

    def backward(self, gradient: Tensor, problem: Problem, partial: Partial) -> Gradients:
        """See `FlashPair`."""
        if problem.sequences is not None:
            return backward_in_batches(self, gradient, problem, partial)
        folded = _fold(problem)
        rows, heads, length, _ = folded[0].shape
        lse = pad(partial.lse, (0, -length % 32), value=torch.inf).reshape(rows, heads, -1)
        gradient, output = (
            tensor.reshape(folded[0].shape).contiguous() for tensor in (gradient, partial.output)
        )
        *gradients, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            gradient, *folded, None, output, lse, *partial.rest, 0.0, [True, True, True, False],
            problem.causal, scale=problem.scale,
        )  # fmt: skip
        return _unfold(gradients, problem)


def _fold(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """For kernels without grouped heads: query [b * g, h / g, q, d] and, without copying, key and value [b *
    g, h / g, k, d]; as they are where no heads are grouped."""
    query, key, value, *_ = problem
    if query.shape[1] == key.shape[1]:
        return query, key, value
    groups = key.shape[0] * key.shape[1]
    query = query.reshape(groups, -1, *query.shape[2:])
    key, value = (
        tensor.reshape(groups, 1, *tensor.shape[2:]).expand(-1, query.shape[1], -1, -1)
        for tensor in (key, value)
    )
    return query, key, value


def _unfold(gradients: Gradients, problem: Problem) -> Gradients:
    """The gradients of `_fold`'s results to those of its arguments."""
    dq, dk, dv = gradients
    query, key, *_ = problem
    if query.shape[1] == key.shape[1]:
        return dq, dk, dv
    return dq.reshape(query.shape), dk.sum(1).reshape(key.shape), dv.sum(1).reshape(key.shape)
