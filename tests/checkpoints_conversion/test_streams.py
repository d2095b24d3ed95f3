"""What happens to weights on their way."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_conversion.streams import CastSource, CheckedSource, shown_progress
from checkpoints_conversion.tensors import ConversionError, MemorySource

TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.ones(2) / 3}


def test_casting() -> None:
    source = CastSource(MemorySource(TENSORS), torch.bfloat16)
    assert {info.dtype for info in source.infos().values()} == {torch.bfloat16}
    assert torch.equal(source.read("b"), TENSORS["b"].bfloat16())
    assert torch.equal(source.read("a", slice(1, 3)), TENSORS["a"][1:3].bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_bad_numbers_are_named(bad: float) -> None:
    broken = TENSORS["a"].clone()
    broken[3, 1] = bad
    source = CheckedSource(MemorySource({"a": broken}), "model.safetensors")
    assert torch.equal(source.read("a", slice(0, 3)), broken[:3])
    with pytest.raises(ConversionError, match=r"model\.safetensors: a contains 1 of 3 values"):
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
        with pytest.raises(ConversionError):
            source.read("a")


def test_no_numbers_are_finite() -> None:
    assert CheckedSource(MemorySource(TENSORS), "here").read("a", slice(1, 1)).shape == (0, 3)


def test_progress_ends_at_the_size_of_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown_progress(MemorySource(TENSORS), "converting") as source:
        source.read("a", slice(0, 2))
        source.read("a", slice(2, 4))
        source.read("b")
    shown = capsys.readouterr().err
    assert "converting: 100%" in shown
    assert "56.0/56.0" in shown


def test_no_bar_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(MemorySource(TENSORS), "converting") as source:
        assert torch.equal(source.read("a"), TENSORS["a"])
        assert source.infos() == MemorySource(TENSORS).infos()
    assert capsys.readouterr().err == ""
