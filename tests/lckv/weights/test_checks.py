"""What is checked of weights: names, shapes, dtypes, finiteness."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.errors import ModelError
from lckv.weights import checks
from lckv.weights.checks import CheckedSource, check_finite, check_tensors
from lckv.weights.tensors import WEIGHT_DTYPES, MemorySource, TensorInfo

TENSORS = {"a": torch.arange(12.0).view(4, 3)}


def test_all_differences_are_told_but_not_at_any_length() -> None:
    expected = {f"layer.{index}.weight": TensorInfo((2, 3), torch.float32) for index in range(27)}
    check_tensors(expected, expected, "here")
    with pytest.raises(ModelError) as caught:
        check_tensors({"stranger": TensorInfo((1,), torch.float32)}, expected, "there")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("there: the tensors are not those")
    assert lines[1].startswith("  27 missing: layer.0.weight, layer.1.")
    assert lines[1].endswith(" and 22 more")
    assert lines[2] == "  1 not part of the model: stranger"


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_counted(
    dtype: torch.dtype, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHUNK_BYTES", 64)
    tensor = torch.zeros(20, 5, dtype=dtype)
    check_finite("good", tensor, "a.safetensors")
    tensor[19, 3] = tensor[7, 1] = bad
    with pytest.raises(
        ModelError, match=r"a.safetensors: w contains 2 of 100 values that are NaN or infinite"
    ):
        check_finite("w", tensor, "a.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_bad_numbers_are_named(bad: float) -> None:
    broken = TENSORS["a"].clone()
    broken[3, 1] = bad
    source = CheckedSource(MemorySource({"a": broken}), "model.safetensors")
    assert torch.equal(source.read("a", slice(0, 3)), broken[:3])
    with pytest.raises(ModelError, match=r"model\.safetensors: a contains 1 of 3 values"):
        source.read("a", slice(3, 4))


@given(
    size=st.integers(1, 300),
    place=st.integers(0, 299),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf"), 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_one_bad_number_anywhere_is_seen(size: int, place: int, bad: float, dtype: torch.dtype) -> None:
    numbers = torch.linspace(-2, 2, size).to(dtype)
    numbers[place % size] = bad
    source = CheckedSource(MemorySource({"a": numbers}), "here")
    if math.isfinite(bad):
        assert torch.equal(source.read("a"), numbers)
    else:
        with pytest.raises(ModelError):
            source.read("a")


def test_no_numbers_are_finite() -> None:
    assert CheckedSource(MemorySource(TENSORS), "here").read("a", slice(1, 1)).shape == (0, 3)
