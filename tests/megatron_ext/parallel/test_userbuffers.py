"""Buffers for the overlap of tensor-parallel communication, made by a stand-in for Transformer Engine."""

import enum
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.model.transformer_config import transformer_config
from megatron_ext.parallel.userbuffers import read_overlap_settings, userbuffers
from megatron_ext.training import loop
from megatron_ext.training.start import Start
from tests.megatron_ext.training.runs import tiny_run

OVERLAP = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True}
RUN = tiny_run(train={"precision": "bf16", "micro_batch_size": 2}, parallel=OVERLAP)


class Modes(enum.Enum):
    """Transformer Engine 2.7 and later: UserBufferQuantizationMode."""

    NONE = "none"
    FP8 = "fp8"


Calls = list[tuple[str, Any]]
Make = Callable[[Calls], Callable[..., None]]


def of_2_11(calls: Calls) -> Callable[..., None]:
    """With the parameters of Transformer Engine 2.7 to 2.11."""

    def initialize_ub(
        shape: list,
        tp_size: int,
        use_fp8: bool = False,
        quantization_modes: list | None = None,
        dtype: Any = "bf16",
        ub_cfgs: dict | list | None = None,
        bootstrap_backend: str | None = None,
    ) -> None:
        assert not use_fp8
        calls.append(("start", (shape, tp_size, quantization_modes, ub_cfgs, bootstrap_backend)))

    return initialize_ub


def of_2_0(calls: Calls) -> Callable[..., None]:
    """With those of Transformer Engine 2.0."""

    def initialize_ub(
        shape: list,
        tp_size: int,
        use_fp8: bool = False,
        dtype: Any = "bf16",
        ub_cfgs: dict | None = None,
        bootstrap_backend: str | None = None,
    ) -> None:
        calls.append(("start", (shape, tp_size, use_fp8, ub_cfgs, bootstrap_backend)))

    return initialize_ub


def install(monkeypatch: pytest.MonkeyPatch, make: Make) -> Calls:
    calls: Calls = []
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module")
    base: Any = ModuleType("transformer_engine.pytorch.module.base")
    base.initialize_ub = make(calls)
    base.destroy_ub = lambda: calls.append(("end", None))
    if make is of_2_11:
        base.UserBufferQuantizationMode = Modes
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "base", base, raising=False)
    return calls


@pytest.mark.parametrize(("make", "numbers"), [(of_2_11, [Modes.NONE]), (of_2_0, False)])
def test_the_buffers_have_the_size_of_a_micro_batch(
    make: Make, numbers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, make)
    with userbuffers(RUN.model, RUN.parallel, RUN.train):
        calls.append(("inside", None))
    start = ("start", ([24 * 2, 32], 2, numbers, None, "nccl"))
    assert calls == [start, ("inside", None), ("end", None)]


def test_without_overlap_transformer_engine_is_not_imported() -> None:
    run = tiny_run()
    with userbuffers(run.model, run.parallel, run.train):
        assert "transformer_engine.pytorch" not in sys.modules


def test_the_buffers_are_there_before_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, of_2_11)

    def build(*arguments: Any, **options: Any) -> None:
        calls.append(("build", None))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "build_stage", build)
    with pytest.raises(KeyboardInterrupt):
        loop._fit(RUN, Start(None, finetune=False, goes_on=False), None)
    assert [name for name, _ in calls] == ["start", "build", "end"]


def test_settings_of_products_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "overlap.yaml"
    path.write_text("qkv_fprop:\n  method: ring_exchange\n  num_sm: 1\n")
    run = tiny_run(parallel={**OVERLAP, "tp_comm_overlap_cfg": str(path)})
    calls = install(monkeypatch, of_2_11)
    with userbuffers(run.model, run.parallel, run.train):
        pass
    assert calls[0][1][3] == {"qkv_fprop": {"method": "ring_exchange", "num_sm": 1}}
    path.write_text("qkv_fprop: ring_exchange")
    with pytest.raises(ConfigError, match="it must map names of products, such as qkv_fprop, to their"):
        read_overlap_settings(str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tp_comm_overlap", True),
        ("tp_comm_overlap_ag", False),
        ("tp_comm_overlap_rs", False),
        ("tp_comm_overlap_rs_dgrad", True),
        ("tp_comm_bulk_dgrad", False),
        ("tp_comm_bulk_wgrad", False),
        ("tp_comm_bootstrap_backend", "gloo"),
    ],
)
def test_every_option_of_the_overlap_arrives_at_megatron(name: str, value: Any) -> None:
    run = tiny_run(parallel={**OVERLAP, "tp_comm_overlap": False, name: value})
    config = transformer_config(run.model, run.compression, run.parallel, run.train, vocab_size=256)
    assert getattr(config, name) == value
