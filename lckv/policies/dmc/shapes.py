"""Pooling as a GPU's kernel does it (`lckv.policies.dmc.kernels.pooling`), on tensors that have shapes and no
numbers: what it keeps for backward, its working memory, and what it moves. Dry runs use it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lckv.policies.dmc.pooling import LARGEST_KERNEL_WINDOW

Pool = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], tuple[Tensor, Tensor]]
Moved = Callable[[float], None]


def pool_of_shapes(original: Pool, moved: Moved) -> Pool:
    """In place of `original`, where the kernel takes the window; `moved` is told the bytes."""

    def pool(
        key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        if window is None or window > LARGEST_KERNEL_WINDOW:
            return original(key, value, merge, weight, window)
        return _Pool.apply(key, value, merge, weight, window, moved)

    return pool


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, window: int, moved: Moved
    ) -> tuple[Tensor, Tensor]:
        merge, weight = (tensor.permute(1, 2, 0).contiguous() for tensor in (merge, weight))
        total = torch.empty_like(weight)
        ctx.save_for_backward(key, value, merge, weight, total)
        ctx.window, ctx.moved = window, moved
        moved(4 * key.numel() * key.element_size())
        return key.new_empty(key.shape), value.new_empty(value.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        key, value, merge, weight, _ = ctx.saved_tensors
        rows, heads, length = merge.shape
        products = merge.new_empty((rows, heads, ctx.window, length))
        ctx.moved(6 * key.numel() * key.element_size() + 4 * products.numel() * products.element_size())
        of_scalars = (torch.empty_like(tensor).permute(2, 0, 1) for tensor in (merge, weight))
        return key.new_empty(key.shape), value.new_empty(value.shape), *of_scalars, None, None
