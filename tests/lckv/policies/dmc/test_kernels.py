"""The Triton kernels: interpreted on CPU, and run on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lckv.policies.dmc.pooling import pool, pool_in_torch, why_not_kernel
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[4]


def in_new_process(tmp_path: Path, *arguments: str, **variables: str) -> str:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"} | variables
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    cases = str(Path(__file__).with_name("interpreted_pooling.py"))
    said = in_new_process(tmp_path, "-m", "pytest", "-q", cases, TRITON_INTERPRET="1")
    assert "7 passed" in said


def cuda_errors(dtype: torch.dtype) -> list[float]:
    assert why_not_kernel("cuda", 12) is None
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 300, 2, 3, 64, generator=generator)
    merge, weight = torch.rand(2, 300, 2, 3, generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (key, value, merge, weight)]
    leaves = [tensor.cuda().requires_grad_() for tensor in (key.to(dtype), value.to(dtype), merge, weight)]
    results = []
    for function, inputs in ((pool, leaves), (pool_in_torch, exact)):
        pooled = function(*inputs, 12)
        objective = (torch.stack(pooled).double() ** 2).sum()
        results.append((*pooled, *torch.autograd.grad(objective, inputs)))
    return [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_cuda(dtype: torch.dtype, tolerance: float) -> None:
    (errors,) = run_on_ranks(1, cuda_errors, dtype, device="cuda")
    assert max(errors) < tolerance
