# mypy: disallow-untyped-defs=False
"""Pooling fused into Triton kernels: one pass over keys and values forward, one over them and their gradients
backward.

The formula is that of `lckv.policies.dmc.pooling`. Forward goes over tokens t and walks back through their
windows, age = t - s. Backward goes over tokens s and walks forward, which gives the gradients of keys and
values, and leaves the dot product of each pooled token's gradient with every token in its window, [b, g, W,
s]; two small kernels turn these into the gradients of decisions and weights. There are no atomics: every run
gives the same bits.

Shapes: s tokens, b rows, g KV heads, d channels. What is one number per token is float32 [b, g, s] here.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TOKENS = 32
"""Tokens per program of the kernels over features, whose tiles have _TOKENS x d entries."""
_SCALAR_TOKENS = 128
"""Tokens per program of the kernels over one number per token."""


def pool(key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Same contract as `lckv.policies.dmc.pooling.pool`, with a window."""
    return _Pool.apply(key, value, merge, weight, window)


@triton.jit
def _load(base, token_stride, row_stride, head_stride, head, heads, token, inside, channel, channels):
    """float32 [tokens, channels] of one row and head of a [s, b, g, d] tensor; 0 outside."""
    start = base + (head // heads) * row_stride + (head % heads) * head_stride
    mask = inside[:, None] & (channel < channels)[None, :]
    return tl.load(start + token.to(tl.int64)[:, None] * token_stride + channel[None, :], mask, 0.0).to(
        tl.float32
    )


@triton.jit
def _store(base, features, head, token, length, channel, channels):
    """Into a contiguous [s, b, g, d] tensor."""
    place = (token.to(tl.int64) * tl.num_programs(1) + head)[:, None] * channels + channel[None, :]
    mask = (token < length)[:, None] & (channel < channels)[None, :]
    tl.store(base + place, features.to(base.dtype.element_ty), mask)


@triton.jit
def _forward(
    key, key_s, key_b, key_g, value, value_s, value_b, value_g, merge, weight,
    pooled_key, pooled_value, total,
    length, heads, channels, WINDOW: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    merge += head * length
    weight += head * length
    product = tl.full([TOKENS], 1.0, tl.float32)
    sum_weight = tl.zeros([TOKENS], tl.float32)
    sum_key = tl.zeros([TOKENS, CHANNELS], tl.float32)
    sum_value = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for age in range(WINDOW):
        source = token - age
        inside = (source >= 0) & (token < length)
        part = product * tl.load(weight + source, inside, 0.0)
        sum_weight += part
        sum_key += part[:, None] * _load(
            key, key_s, key_b, key_g, head, heads, source, inside, channel, channels
        )
        sum_value += part[:, None] * _load(
            value, value_s, value_b, value_g, head, heads, source, inside, channel, channels
        )
        product *= tl.load(merge + source, inside, 0.0)
    sum_weight = tl.where(token < length, sum_weight, 1.0)
    tl.store(total + head * length + token, sum_weight, token < length)
    _store(pooled_key, sum_key / sum_weight[:, None], head, token, length, channel, channels)
    _store(pooled_value, sum_value / sum_weight[:, None], head, token, length, channel, channels)


@triton.jit
def _backward_features(
    grad_key, grad_value, key, key_s, key_b, key_g, value, value_s, value_b, value_g, merge, weight, total,
    dkey, dvalue, products, length, heads, channels,
    WINDOW: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    merge += head * length
    total += head * length
    products += head * WINDOW * length
    grad_s = tl.num_programs(1) * channels
    own_key = _load(key, key_s, key_b, key_g, head, heads, token, token < length, channel, channels)
    own_value = _load(value, value_s, value_b, value_g, head, heads, token, token < length, channel, channels)
    part = tl.load(weight + head * length + token, token < length, 0.0)
    sum_key = tl.zeros([TOKENS, CHANNELS], tl.float32)
    sum_value = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for age in range(WINDOW):
        target = token + age
        inside = target < length
        part *= tl.load(merge + target, inside & (age > 0), 1.0)
        share = tl.where(inside, part / tl.load(total + target, inside, 1.0), 0.0)[:, None]
        of_key = _load(
            grad_key, grad_s, 0, channels, head, tl.num_programs(1), target, inside, channel, channels
        )
        of_value = _load(
            grad_value, grad_s, 0, channels, head, tl.num_programs(1), target, inside, channel, channels
        )
        sum_key += share * of_key
        sum_value += share * of_value
        tl.store(products + age * length + target, tl.sum(of_key * own_key + of_value * own_value, 1), inside)
    _store(dkey, sum_key, head, token, length, channel, channels)
    _store(dvalue, sum_value, head, token, length, channel, channels)


@triton.jit
def _backward_normalisation(
    merge, weight, total, products, length, WINDOW: tl.constexpr, TOKENS: tl.constexpr
):
    """Dot products to the gradients of c(t, s) w_s before their division by the sum, in place."""
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    products += head * WINDOW * length
    sum_weight = tl.load(total + head * length + token, token < length, 1.0)
    product = 1 / sum_weight
    mean = tl.zeros([TOKENS], tl.float32)
    for age in range(WINDOW):
        source = token - age
        inside = (source >= 0) & (token < length)
        share = product * tl.load(weight + head * length + source, inside, 0.0)
        mean += share * tl.load(products + age * length + token, inside, 0.0)
        product *= tl.load(merge + head * length + source, inside, 0.0)
    for age in range(WINDOW):
        inside = (token >= age) & (token < length)
        place = products + age * length + token
        tl.store(place, (tl.load(place, inside, 0.0) - mean) / sum_weight, inside)


@triton.jit
def _backward_decisions(
    merge, weight, products, dmerge, dweight, length, WINDOW: tl.constexpr, TOKENS: tl.constexpr
):
    """Those to the gradients of w and p. The derivative of c(t, s) by p_r is c(t, r) c(r - 1, s): p, which
    may be 0, divides nothing."""
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    merge += head * length
    weight += head * length
    products += head * WINDOW * length
    of_weight = tl.zeros([TOKENS], tl.float32)
    of_merge = tl.zeros([TOKENS], tl.float32)
    later = tl.full([TOKENS], 1.0, tl.float32)
    for after in range(WINDOW):
        target = token + after
        reached = target < length
        later *= tl.load(merge + target, reached & (after > 0), 1.0)
        of_weight += later * tl.load(products + after * length + target, reached, 0.0)
        earlier = later
        for age in range(after + 1, WINDOW):
            source = target - age
            inside = reached & (source >= 0)
            of_part = tl.load(products + age * length + target, inside, 0.0)
            of_merge += earlier * tl.load(weight + source, inside, 0.0) * of_part
            earlier *= tl.load(merge + source, inside, 0.0)
    tl.store(dweight + head * length + token, of_weight, token < length)
    tl.store(dmerge + head * length + token, of_merge, token < length)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        length, rows, heads, channels = key.shape
        key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (key, value))
        merge, weight = (tensor.permute(1, 2, 0).contiguous() for tensor in (merge, weight))
        total = torch.empty_like(weight)
        pooled_key, pooled_value = _empty(key), _empty(value)
        sizes = {"WINDOW": window, "TOKENS": _TOKENS, "CHANNELS": triton.next_power_of_2(channels)}
        with torch.cuda.device_of(key):  # Triton launches on the current device
            _forward[triton.cdiv(length, _TOKENS), rows * heads](
                key, *key.stride()[:3], value, *value.stride()[:3], merge, weight,
                pooled_key, pooled_value, total,
                length, heads, channels, **sizes,
            )  # fmt: skip
        ctx.save_for_backward(key, value, merge, weight, total)
        ctx.sizes = sizes
        return pooled_key, pooled_value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        key, value, merge, weight, total = ctx.saved_tensors
        length, rows, heads, channels = key.shape
        dkey, dvalue, dmerge, dweight = (
            _empty(key),
            _empty(value),
            torch.empty_like(merge),
            torch.empty_like(weight),
        )
        products = torch.empty(rows, heads, ctx.sizes["WINDOW"], length, device=key.device)
        grid = triton.cdiv(length, _SCALAR_TOKENS), rows * heads
        sizes = {"WINDOW": ctx.sizes["WINDOW"], "TOKENS": _SCALAR_TOKENS}
        with torch.cuda.device_of(key):
            _backward_features[triton.cdiv(length, _TOKENS), rows * heads](
                grad_key.contiguous(), grad_value.contiguous(),
                key, *key.stride()[:3], value, *value.stride()[:3],
                merge, weight, total, dkey, dvalue, products, length, heads, channels, **ctx.sizes,
            )  # fmt: skip
            _backward_normalisation[grid](merge, weight, total, products, length, **sizes)
            _backward_decisions[grid](merge, weight, products, dmerge, dweight, length, **sizes)
        return dkey, dvalue, dmerge.permute(2, 0, 1), dweight.permute(2, 0, 1), None


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
