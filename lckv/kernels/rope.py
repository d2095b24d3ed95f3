# mypy: disallow-untyped-defs=False
"""RoPE as one Triton kernel, which reads the heads once and writes them turned, both halves and the last
channel, with float32 arithmetic. Backward is the same kernel with the negative angles.

The formula is that of `lckv.rope`. Heads lie as a projection leaves them: their channels are next to each
other, the rest in any strides; a gradient, too. Angles are those of a token, whatever head.

Shapes: s tokens, b rows, h heads, D channels of a head, each of whose halves has D/2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048
"""In half of a program's tile, at most, where a head has no more: heads times D/2."""


def turned(
    heads: Tensor, cos: Tensor, sin: Tensor, last: Tensor | float | None, *, back: bool = False
) -> Tensor:
    """Same contract as `lckv.rope.turned`, for heads [s, b, h, D] of float32, float16 or bfloat16, angles [s,
    b, 1, D/2] and `last` [s, b, h]."""
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    length, rows, count, channels = heads.shape
    of_angles = length, rows, channels // 2
    cos, sin = (angle.squeeze(2).expand(of_angles).contiguous() for angle in (cos, sin))
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    is_tensor = isinstance(last, Tensor)
    newest = last.expand(heads.shape[:-1]) if isinstance(last, Tensor) else result[..., 0]
    half = triton.next_power_of_2(channels // 2)
    tile = min(triton.next_power_of_2(count), max(1, _NUMBERS // half))
    with torch.cuda.device_of(heads):  # Triton launches on the current device
        _turn[length * rows, triton.cdiv(count, tile)](
            heads, *heads.stride()[:3], cos, sin, newest, *newest.stride(),
            0.0 if is_tensor or last is None else float(last), -1.0 if back else 1.0, result,
            rows, count, channels // 2,
            LAST=last is not None, EACH=is_tensor, HEADS=tile, HALF=half,
        )  # fmt: skip
    return result


@triton.jit
def _turn(
    heads, heads_s, heads_b, heads_h, cos, sin, last, last_s, last_b, last_h, of_all, sign, result,
    rows, count, half,
    LAST: tl.constexpr, EACH: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Some heads of a token. With LAST the last channel becomes `of_all`, or with EACH what `last` says."""
    token = tl.program_id(0).to(tl.int64)
    head, channel = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    in_half, in_heads = channel < half, head < count
    inside = in_heads[:, None] & in_half[None, :]
    source = heads + token // rows * heads_s + token % rows * heads_b
    source += head.to(tl.int64)[:, None] * heads_h + channel[None, :]
    first = tl.load(source, inside, 0.0).to(tl.float32)
    second = tl.load(source + half, inside, 0.0).to(tl.float32)
    cosine = tl.load(cos + token * half + channel, in_half, 0.0)[None, :]
    sine = tl.load(sin + token * half + channel, in_half, 0.0)[None, :] * sign
    is_last = (channel == half - 1)[None, :]
    if LAST:
        second = tl.where(is_last, 0.0, second)
    one, two = first * cosine - second * sine, second * cosine + first * sine
    if EACH:
        newest = last + token // rows * last_s + token % rows * last_b + head.to(tl.int64) * last_h
        two = tl.where(is_last, tl.load(newest, in_heads, 0.0).to(tl.float32)[:, None], two)
    elif LAST:
        two = tl.where(is_last, of_all, two)
    target = result + (token * count + head)[:, None] * 2 * half + channel[None, :]
    tl.store(target, one.to(result.dtype.element_ty), inside)
    tl.store(target + half, two.to(result.dtype.element_ty), inside)
