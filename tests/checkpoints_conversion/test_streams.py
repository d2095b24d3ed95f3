"""What happens to weights on their way."""

import sys

import pytest
import torch

from checkpoints_conversion.streams import CastSource, shown_progress
from lckv.weights.tensors import MemorySource

TENSORS = {"a": torch.arange(12.0).view(4, 3), "b": torch.ones(2) / 3}


def test_casting() -> None:
    source = CastSource(MemorySource(TENSORS), torch.bfloat16)
    assert {info.dtype for info in source.infos().values()} == {torch.bfloat16}
    assert torch.equal(source.read("b"), TENSORS["b"].bfloat16())
    assert torch.equal(source.read("a", slice(1, 3)), TENSORS["a"][1:3].bfloat16())


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
