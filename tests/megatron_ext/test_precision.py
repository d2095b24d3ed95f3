"""What train.precision means."""

import typing

import pytest
import torch

from megatron_ext.config import TrainConfig
from megatron_ext.precision import precision, precision_for

NAMES = typing.get_args(typing.get_type_hints(TrainConfig)["precision"])


@pytest.mark.parametrize("name", NAMES)
def test_every_precision_of_a_run(name) -> None:
    kind = precision(name)
    assert kind.name == name
    assert kind.bytes == kind.dtype.itemsize
    assert kind.optimizer_bytes == 8 + 4 * kind.is_bf16


def test_what_weights_are_trained_in() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert [precision_for(dtype).name for dtype in dtypes] == ["fp32", "bf16", "fp32"]
