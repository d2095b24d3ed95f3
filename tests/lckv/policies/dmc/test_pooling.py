"""Pooling: two fast algorithms and the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.policies.dmc.pooling import pool, pool_by_formula, pool_in_torch, why_not_kernel


def inputs(length, rows=2, heads=2, channels=3, dtype=torch.float64, hard=False):
    """Leaves key, value, merge, weight; a share of the decisions is exactly 0 and exactly 1."""
    generator = torch.Generator().manual_seed(length)
    uniform = torch.rand(2, length, rows, heads, dtype=dtype, generator=generator)
    merge = (uniform[0] * 1.5 - 0.25).clamp(0, 1)
    merge = merge.round() if hard else merge
    key, value = torch.randn(2, length, rows, heads, channels, dtype=dtype, generator=generator)
    return [tensor.requires_grad_() for tensor in (key, value, merge, uniform[1] + 1e-3)]


def with_gradients(function, leaves):
    results = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    objective = sum(
        (result * torch.randn(result.shape, generator=generator).to(result)).sum() for result in results
    )
    return *results, *torch.autograd.grad(objective, leaves, materialize_grads=True)


@given(length=st.integers(1, 40), window=st.none() | st.integers(1, 45), hard=st.booleans())
def test_equals_the_formula(length, window, hard):
    leaves = inputs(length, hard=hard)
    found = with_gradients(lambda *leaves: pool_in_torch(*leaves, window), leaves)
    expected = with_gradients(
        lambda key, value, *rest: [pool_by_formula(features, *rest, window) for features in (key, value)],
        leaves,
    )
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [3, None])
def test_gradients_by_finite_differences(window):
    assert torch.autograd.gradcheck(lambda *leaves: pool_in_torch(*leaves, window), inputs(7, rows=1))


@pytest.mark.parametrize("window", [12, None])
def test_float32_sums_of_a_long_slot_stay_exact(window):
    length = 3000
    leaves = inputs(length, rows=1, dtype=torch.float32)
    key, value, weight = leaves[0] + 3, leaves[1], leaves[3]
    merge = torch.full_like(leaves[2], 1.0)
    found = pool_in_torch(key, value, merge, weight, window)
    wide = [tensor.double() for tensor in (key, value, merge, weight)]
    for actual, right in zip(found, pool_in_torch(*wide, window), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=0, atol=5e-6)


@pytest.mark.parametrize("window", [5, None])
def test_bfloat16_features_are_summed_in_float32(window):
    key, value, merge, weight = (tensor.detach().float() for tensor in inputs(30))
    rounded = [key.bfloat16(), value.bfloat16()]
    found = pool_in_torch(*rounded, merge, weight, window)
    for actual, right in zip(
        found, pool_in_torch(*(t.float() for t in rounded), merge, weight, window), strict=True
    ):
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, right.bfloat16())


@pytest.mark.parametrize("window", [12, None])
def test_what_is_kept_for_backward_grows_with_the_length_only(window):
    kept = []
    for length in (100, 400):
        sizes = {}
        leaves = inputs(length, channels=32)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.update({tensor.data_ptr(): tensor.numel()}) or tensor,
            lambda tensor: tensor,
        ):
            results = pool_in_torch(*leaves, window)
        kept.append(sum(sizes.values()))
        del results
    assert kept[1] < 4.5 * kept[0]


def test_the_kernel_is_chosen_where_it_can_run():
    assert why_not_kernel("cpu", 12) == "the Triton kernel needs CUDA tensors, the model is on cpu"
    for window in (None, 65):
        assert f"up to 64 tokens, the window is {window}" in (why_not_kernel("cuda", window) or "no") or (
            why_not_kernel("cuda", window) == "the package triton is not installed"
        )
    leaves = inputs(9)
    for actual, right in zip(pool(*leaves, 4), pool_in_torch(*leaves, 4), strict=True):
        assert torch.equal(actual, right)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    why_not_kernel.cache_clear()
    assert why_not_kernel("cuda", 12) == "the package triton is not installed"
    why_not_kernel.cache_clear()
