"""The three products of a linear layer and its loss, with sums in float32 whatever the inputs are.

Shapes: c tokens of a chunk, h channels, v rows of the weight. `wide` is float32, or float64 for float64.

bfloat16 on CUDA: the logits and the weight's gradient leave the kernel in float32; the logits' gradient goes
in rounded to bfloat16, as that of a plain layer. Elsewhere torch has no kernel that takes bfloat16 and gives
float32, so a block of the weight at a time is made wide.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_NUMBERS = 1 << 22
"""Of the weight, made wide at a time: 16 MiB."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of `dtype` are added up."""
    return torch.promote_types(dtype, torch.float32)


def gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of such matrices can leave its kernel in float32 (CUDA, torch 2.8)."""
    return device.type == "cuda" and dtype == torch.bfloat16 and hasattr(torch.ops.aten.mm, "dtype")


def room_for_logits(states: Tensor, weight: Tensor, size: int) -> Tensor | None:
    """Memory for the logits of chunks of `size` of the tokens [n, h]; None where the kernel makes it."""
    if gives_float32(states.device, states.dtype):
        return None
    return states.new_empty((min(size, len(states)), len(weight)), dtype=wide_dtype(states.dtype))


def logits_of(states: Tensor, weight: Tensor, room: Tensor | None) -> Tensor:
    """states [c, h] @ weight.t() [h, v], wide; in the first c rows of `room_for_logits`."""
    wide = wide_dtype(states.dtype)
    if room is None:
        return torch.mm(states, weight.t(), out_dtype=wide)
    room = room[: len(states)]
    if states.dtype == wide:
        return torch.mm(states, weight.t(), out=room)
    for rows, block in _blocks(weight, wide):
        torch.mm(states.to(wide), block.t(), out=room[:, rows])
    return room


def gradient_of_states(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [c, v], wide, @ weight [v, h]: [c, h], wide or in the weight's dtype."""
    if gives_float32(weight.device, weight.dtype):
        return torch.mm(gradient.to(weight.dtype), weight)
    if weight.dtype == gradient.dtype:
        return torch.mm(gradient, weight)
    total = gradient.new_zeros((len(gradient), weight.shape[1]))
    for rows, block in _blocks(weight, gradient.dtype):
        torch.addmm(total, gradient[:, rows], block, out=total)
    return total


def add_of_weight(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """Add gradient.t() [v, c] @ states [c, h] to `total` [v, h], wide."""
    if gives_float32(states.device, states.dtype):
        torch.addmm(total, gradient.to(states.dtype).t(), states, out_dtype=total.dtype, out=total)
        return
    torch.addmm(total, gradient.t(), states.to(total.dtype), out=total)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight, and these in `dtype`, some at a time."""
    size = max(1, _BLOCK_NUMBERS // weight.shape[1])
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        yield rows, weight[rows].to(dtype)
