"""Attention of one query per head to paged slots: the twin against the formula, the kernel interpreted and
on CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.attention import paged
from lckv.attention.paged import attend_in_torch, attend_paged, join, why_not_kernel
from lckv.attention.pages import PagesAttended, WorkOnHost, tiles_of_the_kernel
from tests.lckv.attention.paged_slots import Slots
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[3]


def close(found: PagesAttended, expected: PagesAttended, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), rtol=tolerance, atol=tolerance)


@given(
    lengths=st.lists(st.lists(st.integers(0, 150), min_size=2, max_size=2), min_size=1, max_size=3),
    page_size=st.sampled_from([1, 4, 16, 24, 256]),
    group=st.integers(1, 3),
    window=st.booleans(),
    gap=st.booleans(),
)
def test_equals_the_formula(
    lengths: list[list[int]], page_size: int, group: int, window: bool, gap: bool
) -> None:
    slots = Slots(torch.tensor(lengths), page_size, group, 8, window=window, gap=gap)
    close(slots.attend(attend_paged), slots.by_formula(), 1e-5)


def test_slots_that_the_work_covers_are_not_all_seen() -> None:
    """As where the newest slot is hidden from whoever is merged into it."""
    slots = Slots(torch.tensor([[65, 1], [40, 0]]), 16, 2, 8)
    slots.stop = slots.stop - torch.tensor([[1, 1], [1, 0]])
    slots.lengths = slots.stop
    found = slots.attend(attend_paged)
    close(found, slots.by_formula(), 1e-5)
    assert (found.lse[0, 2:] == -torch.inf).all() and (found.output[0, 2:] == 0).all()


@pytest.mark.parametrize("window", [False, True])
def test_a_list_with_room_for_more(window: bool) -> None:
    """What is behind the work adds zeros; filled again, nothing of the old list is left."""
    slots = Slots(torch.tensor([[200, 65], [0, 300]]), 16, 2, 8, window=window)
    expected = slots.attend(attend_in_torch)
    padded = slots.padded(32)
    padded.fill(WorkOnHost(np.array([3, 3]), np.array([0, 64]), np.array([1, 2]), np.array([0, 0, 0, 0, 2])))
    padded.fill(WorkOnHost(*(part.numpy() for part in slots.work)))
    slots.work = padded.work
    for one, other in zip(slots.attend(attend_in_torch), expected, strict=True):
        assert torch.equal(one, other)


def test_memory_of_the_twin_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(torch.tensor([[700, 30], [0, 256]]), 16, 2, 8)
    whole = slots.attend(attend_in_torch)
    monkeypatch.setattr(paged, "_BYTES_AT_ONCE", 1)
    close(slots.attend(attend_in_torch), PagesAttended(*(tensor.double() for tensor in whole)), 1e-6)


def test_bfloat16() -> None:
    slots = Slots(torch.tensor([[300, 20]]), 16, 4, 16, window=True, dtype=torch.bfloat16)
    found = slots.attend(attend_in_torch)
    assert found.output.dtype == torch.float32
    close(found, slots.by_formula(), 2e-2)


def test_one_more_key_joins() -> None:
    slots = Slots(torch.tensor([[10, 0]]), 4, 2, 8)
    key, value = torch.randn(2, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    score = (slots.query.view(1, 2, 2, 8) * key[:, :, None]).sum(-1).flatten(1) * slots.scale
    output = join(slots.attend(attend_paged), score, value)
    past = slots.by_formula()
    weights = torch.stack((past.lse, score.double())).softmax(0)[..., None]
    expected = weights[0] * past.output + weights[1] * value.double().repeat_interleave(2, 1)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_why_not_kernel() -> None:
    assert "on cpu" in str(why_not_kernel("cpu", torch.float32, 4, 128))
    assert "float64" in str(why_not_kernel("cuda", torch.float64, 4, 128))
    assert why_not_kernel("cuda", torch.bfloat16, 32, 256) is None
    assert why_not_kernel("cuda", torch.float32, 32, 256) is None
    too_large = "64 query heads of 256 channels per KV head in torch.float32 are more than"
    assert too_large in str(why_not_kernel("cuda", torch.float32, 64, 256))


@pytest.mark.parametrize(
    ("group", "channels", "chunk", "element_bytes", "tiles"),
    [
        (1, 128, 256, 2, (16, 128, 64)),
        (4, 80, 240, 2, (16, 128, 64)),
        (32, 256, 256, 2, (32, 256, 64)),
        (1, 256, 256, 4, (16, 256, 32)),
        (32, 256, 256, 4, (32, 256, 16)),
        (33, 256, 256, 4, None),
        (1, 64, 1, 4, (16, 64, 16)),
    ],
)
def test_tiles_of_the_kernel(
    group: int, channels: int, chunk: int, element_bytes: int, tiles: tuple[int, int, int] | None
) -> None:
    assert tiles_of_the_kernel(group, channels, chunk, element_bytes) == tiles


def in_new_process(tmp_path: Path, *arguments: str, **variables: str) -> str:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"} | variables
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernel_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    cases = str(Path(__file__).with_name("interpreted_paged.py"))
    said = in_new_process(tmp_path, "-m", "pytest", "-q", cases, TRITON_INTERPRET="1")
    assert "7 passed" in said


def cuda_errors(dtype: torch.dtype, page_size: int) -> list[float]:
    assert why_not_kernel("cuda", dtype, 4, 64) is None
    lengths = torch.tensor([[3000, 17], [0, 700], [256, 257]])
    slots = Slots(lengths, page_size, 4, 64, window=True, gap=True, dtype=dtype, device="cuda")
    found, expected = slots.attend(attend_paged), slots.by_formula()
    there = expected.lse > -torch.inf
    assert torch.equal(found.lse.cpu() > -torch.inf, there)
    lse = (found.lse.cpu()[there].double() - expected.lse[there]).abs().max()
    return [float((found.output.cpu().double() - expected.output).abs().max()), float(lse)]


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_kernel_on_cuda(dtype: torch.dtype, tolerance: float, page_size: int) -> None:
    (errors,) = run_on_ranks(1, cuda_errors, dtype, page_size, device="cuda")
    assert max(errors) < tolerance
