"""The Triton kernels against the PyTorch twin, on CPU through Triton's interpreter.

Not collected by name: Triton decides when it is imported whether it interprets, so `test_kernels.py` runs
this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from lckv.policies.dmc.kernels.pooling import pool
from lckv.policies.dmc.pooling import pool_in_torch


@pytest.mark.parametrize(
    ("length", "window", "channels", "dtype"),
    [
        (37, 12, 8, torch.float32),
        (37, 5, 8, torch.bfloat16),
        (5, 12, 6, torch.float32),
        (33, 1, 16, torch.float32),
        (1, 3, 8, torch.float32),
        (130, 2, 4, torch.float32),
    ],
)
def test_equals_the_twin(length, window, channels, dtype):
    generator = torch.Generator().manual_seed(length)
    fused = torch.randn(length, 2, 2, 4, channels, generator=generator).to(dtype)
    key, value = fused[:, :, :, 1].requires_grad_(), fused[:, :, :, 3].contiguous().requires_grad_()
    merge, weight = torch.rand(2, length, 2, 2, generator=generator)
    merge = (merge * 1.5 - 0.25).clamp(0, 1)
    leaves = [key, value, merge.requires_grad_(), (weight + 0.1).requires_grad_()]
    functional = torch.randn(2, length, 2, 2, channels, generator=generator).to(dtype)
    results = []
    for function in (pool, pool_in_torch):
        pooled = function(*leaves, window)
        objective = (torch.stack(pooled) * functional).float().sum()
        results.append((*pooled, *torch.autograd.grad(objective, leaves, materialize_grads=True)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_features_in_any_layout():
    key = torch.randn(5, 4, 2, 9).transpose(0, 3)[:8]
    value = torch.randn(1, 4, 2, 5).expand(8, 4, 2, 5)
    merge, weight = torch.rand(2, 8, 4, 2)
    for found, expected in zip(
        pool(key, value, merge, weight, 3), pool_in_torch(key, value, merge, weight, 3), strict=True
    ):
        torch.testing.assert_close(found, expected)
