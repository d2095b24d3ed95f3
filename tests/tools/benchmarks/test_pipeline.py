"""The benchmark of pipelines: what it predicts, and its picture."""

import argparse
from pathlib import Path

import pytest

from megatron_ext.command_line import parse_run_config
from tools.benchmarks import pipeline
from tools.benchmarks.pipeline import _MAPS, draw, predicted, settings


def test_two_stages_are_predicted_to_take_more_than_half() -> None:
    options = argparse.Namespace(hidden_size=64, seq_length=32, micro_batches=8, steps=2)
    for layer_types in _MAPS.values():
        run = parse_run_config(settings(layer_types, 2, options))
        ticks, ratio = predicted(run, 8)
        assert 0.5 < ratio < 0.75
        assert ratio * 2 * (1 - ticks.bubble) == 1


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_STAGES", range(2, 4))
    monkeypatch.setattr(pipeline, "_MICRO_BATCHES", (1, 4))
    draw(tmp_path / "bubbles.png")
    assert (tmp_path / "bubbles.png").read_bytes().startswith(b"\x89PNG")
