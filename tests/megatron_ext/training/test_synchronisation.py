"""Where a training step asks the device for a number, and so waits for it: nowhere but in the places listed.

Python code that reads a tensor is watched, whatever device it is on; what reads only tensors of the host is
listed with that reason.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_ext.training import iteration
from tests.megatron_ext.data.builders import CHATML, save_tokenizer
from tests.megatron_ext.training.runs import tiny_run, train
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[3]

READING = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.nonzero, torch.nonzero, Tensor.masked_select, torch.masked_select,
    Tensor.__contains__,
}  # fmt: skip
"""Functions whose result the host needs, or whose shape it does."""

ALLOWED = {
    ("megatron_ext/data/batch.py", "make_batch"): "the samples are on the host",
    ("megatron_ext/data/batch.py", "documents"): "bounds of documents are on the host",
    (
        "megatron_ext/schedule/micro_batches.py",
        "run_schedule",
    ): "megatron-core's, once a step: are there tokens",
    ("megatron_ext/schedule/micro_batches.py", "mean_loss"): "once a step, behind the optimizer: the loss",
    ("megatron_ext/training/step.py", "train_step"): "once a step, behind the optimizer: the gradient norm",
    ("megatron_ext/schedule/statistics_meter.py", "total"): "once a step, behind the optimizer: statistics",
    ("megatron_ext/schedule/statistics_meter.py", "by_name"): "statistics, which are on the host by then",
}
"""File and function, and why it may."""

COMPRESSIONS: dict[str, dict[str, Any]] = {
    "lckv": {"layer_types": "0_2_2_3", "forward_passes": 1, "backward_passes": 2},
    "yoco": {"layer_types": "0s_1s_2_2", "sliding_window": 8},
    "lckv x dmc": {
        "layer_types": "0_2_2_3",
        "forward_passes": 1,
        "backward_passes": 2,
        "policy": {"name": "dmc", "stage": "retrofit", "target_compression_ratio": 2.0},
    },
}


class Readings(TorchFunctionMode):
    """Collects who reads tensors: the innermost function of this project on the stack."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, str], str] = {}

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        indexed = function in (Tensor.__getitem__, Tensor.__setitem__) and _is_mask(arguments[1])
        if function in READING or indexed:
            self.places.setdefault(_place(sys._getframe()), function.__name__)
        return function(*arguments, **(options or {}))


def _is_mask(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return any(isinstance(entry, Tensor) and entry.dtype == torch.bool for entry in entries)


def _place(frame: FrameType | None) -> tuple[str, str]:
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "tests" not in file.parts and ".venv" not in str(file):
            return file.relative_to(ROOT).as_posix(), frame.f_code.co_name
        frame = frame.f_back
    return "?", "?"


def readings_of_a_step(compression: dict[str, Any], tokenizer: str) -> dict[tuple[str, str], str]:
    """Of the second step, when all that is made once is there."""
    readings, steps, original = Readings(), [], iteration.train_step

    def watched(*arguments: Any, **options: Any) -> Any:
        steps.append(None)
        if len(steps) != 2:
            return original(*arguments, **options)
        with readings:
            return original(*arguments, **options)

    run = tiny_run(
        compression=compression,
        train={"train_iters": 3, "precision": "bf16"},
        model={"vocab_size": None},
        data={
            "tokenizer_type": "huggingface",
            "tokenizer_model": tokenizer,  # it knows which token ends a document
            "reset_attention_mask": True,
            "reset_position_ids": True,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "train_step", watched)
        train(run)
    return readings.places


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_step_waits_nowhere_but_where_it_says_so(name: str, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML)
    (places,) = run_on_ranks(1, readings_of_a_step, COMPRESSIONS[name], str(tokenizer))
    ours = {place: what for place, what in places.items() if place[0] != "?"}
    assert {place: what for place, what in ours.items() if place not in ALLOWED} == {}
    assert ("megatron_ext/schedule/micro_batches.py", "mean_loss") in ours  # it is noticed
