"""RoPE's Triton kernel: interpreted on CPU, and run on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lckv.rope import Rotation, inverse_frequencies, rotate, rotate_by_formula, rotation
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[3]


def test_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    cases = str(Path(__file__).with_name("interpreted_rope.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 passed" in done.stdout


def cuda_error(dtype: torch.dtype) -> float:
    """The largest of outputs and gradients, relative to the largest number."""
    from lckv.kernels.rope import turned

    angles = rotation(torch.arange(3000)[:, None, None], inverse_frequencies(128, 1e4))
    heads = torch.randn(3000, 2, 40, 128).to(dtype)
    last = torch.randn(3000, 2, 40).to(dtype)
    results = []
    for number, device in ((dtype, "cuda"), (torch.float64, "cpu")):
        leaves = [tensor.to(device, number).requires_grad_() for tensor in (heads, last)]
        if device == "cuda":
            result = rotate(leaves[0], Rotation(*(a.cuda() for a in angles)), last=leaves[1], kernel=turned)
        else:
            exact = Rotation(*(angle.double() for angle in angles))
            result = rotate_by_formula(leaves[0], exact, last=leaves[1])
        results.append((result, *torch.autograd.grad(result.double().square().sum(), leaves)))
    return max(
        float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_on_cuda(dtype: torch.dtype, tolerance: float) -> None:
    (error,) = run_on_ranks(1, cuda_error, dtype, device="cuda")
    assert error < tolerance
