"""Flash attention, causal or full, as a forward that also returns the logsumexp of each query's scores, and
its backward.

A backward computes probabilities as exp(score - lse) and subtracts the row sum of gradient times output.
Given the lse and the output of a larger softmax, of which this attention is one part, it returns this part's
gradients: ring attention is built on that, and so is attention with biased keys (`lckv.attention.biased`).

Shapes: query, output and gradient [b, h, q, d], key and value [b, g, k, d] with h a multiple of g, lse [b, h,
q] in float32, or in float64 for float64 queries. Where attention is causal, q = k.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.head_sizes import obstacle_to_biased_keys
from lckv.errors import UnsupportedError

_ATEN = torch.ops.aten


class Partial(NamedTuple):
    """What a forward returns: attention to some of the keys."""

    output: Tensor
    lse: Tensor
    rest: tuple[Any, ...] = ()
    """What the backward wants back besides these."""


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value, in their shapes."""


class FlashPair(Protocol):
    """Attention without dropout: query i sees keys 0 .. i of as many, or, where it is not causal, all keys,
    of which there is at least one."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Partial:
        """Output and lse."""
        ...

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
        """Gradients of query, key and value from that of the output."""
        ...


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


def require_fitting_heads(query: Tensor) -> None:
    """Raises UnsupportedError where kernels of a GPU do not take as many channels as `query` has."""
    channels = query.shape[-1]
    obstacle = obstacle_to_biased_keys(channels, float32=query.dtype == torch.float32)
    if obstacle is not None:
        raise UnsupportedError(f"flash attention in heads of {channels} channels", obstacle)


class AtenCPU:
    """CPU; float16, bfloat16, float32 and float64."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Partial:
        """See `FlashPair`."""
        folded = _fold(query, key, value)
        output, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(*folded, 0.0, causal, scale=scale)
        return Partial(output.reshape(query.shape), lse.reshape(query.shape[:-1]))

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
        folded = _fold(query, key, value)
        gradient, output, lse = (
            tensor.reshape(*folded[0].shape[:3], *tensor.shape[3:])
            for tensor in (gradient, partial.output, partial.lse)
        )
        gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, *folded, output, lse, 0.0, causal, scale=scale
        )
        return _unfold(gradients, query, key)


class AtenFlash:
    """CUDA; float16 and bfloat16, heads of a multiple of 8 and at most 256 channels."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Partial:
        """See `FlashPair`."""
        output, lse, *rest, _ = _ATEN._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return Partial(output, lse, tuple(rest))

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
        *lengths, seed, offset = partial.rest
        return _ATEN._scaled_dot_product_flash_attention_backward(
            gradient,
            query,
            key,
            value,
            partial.output,
            partial.lse.contiguous(),
            *lengths,
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )


class AtenEfficient:
    """CUDA; float32."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Partial:
        """See `FlashPair`."""
        folded = _fold(query, key, value)
        output, lse, *rest = _ATEN._scaled_dot_product_efficient_attention(
            *folded, None, True, 0.0, causal, scale=scale
        )
        lse = lse[..., : query.shape[2]]  # the kernel pads rows to its block
        return Partial(output.reshape(query.shape), lse.reshape(query.shape[:-1]), tuple(rest))

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
        folded = _fold(query, key, value)
        rows, heads, length, _ = folded[0].shape
        lse = pad(partial.lse, (0, -length % 32), value=torch.inf).reshape(rows, heads, -1)
        gradient, output = (
            tensor.reshape(folded[0].shape).contiguous() for tensor in (gradient, partial.output)
        )
        *gradients, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            gradient,
            *folded,
            None,
            output,
            lse,
            *partial.rest,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
        return _unfold(gradients, query, key)


class FlashAttnInterface(Protocol):
    """The functions of `flash_attn.flash_attn_interface` (2.7 and newer) that are used here; tensors are [b,
    s, heads, d]."""

    def _flash_attn_forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]: ...

    def _flash_attn_backward(
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Partial:
        """See `FlashPair`."""
        require_fitting_heads(query)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output, lse, _, random_state = self._interface._flash_attn_forward(
            query, key, value, return_softmax=False, **self._options(scale, causal)
        )
        return Partial(output.transpose(1, 2), lse, (random_state,))

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
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (query, key, value))
        self._interface._flash_attn_backward(
            gradient.transpose(1, 2),
            query,
            key,
            value,
            out=partial.output.transpose(1, 2),
            softmax_lse=partial.lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=partial.rest[0],
            **self._options(scale, causal),
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _fold(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For kernels without grouped heads: query [b * g, h / g, q, d] and, without copying, key and value [b *
    g, h / g, k, d]."""
    groups = key.shape[0] * key.shape[1]
    query = query.reshape(groups, -1, *query.shape[2:])
    key, value = (
        tensor.reshape(groups, 1, *tensor.shape[2:]).expand(-1, query.shape[1], -1, -1)
        for tensor in (key, value)
    )
    return query, key, value


def _unfold(gradients: Gradients, query: Tensor, key: Tensor) -> Gradients:
    """The gradients of `_fold`'s results to those of its arguments."""
    dq, dk, dv = gradients
    if query.shape[1] == key.shape[1]:
        return dq.reshape(query.shape), dk.reshape(key.shape), dv.reshape(key.shape)
    return dq.reshape(query.shape), dk.sum(1).reshape(key.shape), dv.sum(1).reshape(key.shape)
