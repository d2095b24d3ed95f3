"""What validation says about FP8."""

from collections.abc import Mapping
from typing import Any

import pytest

from megatron_ext.validation.run import problems
from tests.megatron_ext.validation.test_options import OVERLAP, install
from tests.megatron_ext.validation.test_run import run_with

FP8 = {"model.fp8": "hybrid"}
LCKV = {"compression.layer_types": "0_6_6_6_6_6_6_7"}
ALONE = {**FP8, **LCKV, "model.fp8_passes": "no_gradient"}
HOPPER = (9, 0)

CASES: list[tuple[Mapping[str, Any], tuple[int, int], str]] = [
    (
        {"model.fp8_recipe": "blockwise"},
        HOPPER,
        "model.fp8_recipe is blockwise and model.fp8 is not set; set the latter to e4m3 or hybrid, or leave",
    ),
    ({"model.fp8_passes": "no_gradient"}, HOPPER, "model.fp8_passes is no_gradient and model.fp8 is not set"),
    (
        {**FP8, "model.transformer_impl": "local"},
        HOPPER,
        "model.fp8 is hybrid and model.transformer_impl is local; the former needs",
    ),
    (
        {**FP8, "train.precision": "fp32"},
        HOPPER,
        "model.fp8 is hybrid and train.precision is fp32, for which",
    ),
    (
        {**FP8, "model.fp8_passes": "no_gradient"},
        HOPPER,
        "compression.layer_types is 0_1_2_3_4_5_6_7 and compression.forward_passes is 7; so no pass",
    ),
    (
        {**ALONE, "compression.forward_passes": 0},
        HOPPER,
        "and compression.forward_passes is 0; so no pass is without gradient: set model.fp8_passes to all",
    ),
    (
        {**ALONE, "model.fp8_recipe": "delayed"},
        HOPPER,
        "model.fp8_passes is no_gradient and model.fp8_recipe is delayed, whose scales are of passes with",
    ),
    (
        {**FP8, "model.kv_channels": 10},
        HOPPER,
        "model.num_attention_heads 4 * model.kv_channels 10 / parallel.tensor_model_parallel_size 1 is 40",
    ),
    (
        {**FP8, "model.ffn_hidden_size": 1000},
        HOPPER,
        "model.ffn_hidden_size 1000 / parallel.tensor_model_parallel_size 1 is 1000 and",
    ),
    (
        {**FP8, "train.seq_length": 1000},
        HOPPER,
        "train.seq_length 1000 * train.micro_batch_size 1 is 1000 and model.fp8_recipe is tensorwise",
    ),
    (
        {**FP8, "model.fp8_recipe": "mxfp8", "train.seq_length": 1008},
        (10, 0),
        "is 1008 and model.fp8_recipe is mxfp8; a matrix in FP8 with this recipe has sides that are",
    ),
    (
        FP8,
        (8, 0),
        "model.fp8_recipe is tensorwise, which needs a GPU of compute capability 8.9, and this one",
    ),
    (
        {**FP8, "model.fp8_recipe": "blockwise"},
        (8, 9),
        "model.fp8_recipe is blockwise, which needs a GPU of compute capability 9.0, and this one has 8.9",
    ),
    (
        {**FP8, "model.fp8_recipe": "mxfp8"},
        HOPPER,
        "model.fp8_recipe is mxfp8, which needs a GPU of compute capability 10.0, and this one has 9.0",
    ),
    (
        {**FP8, "model.fp8_recipe": "mxfp8"},
        (12, 0),
        "model.fp8_recipe is mxfp8, which Transformer Engine does not have for GPUs of compute",
    ),
]


@pytest.mark.parametrize(("changes", "capability", "message"), CASES)
def test_one_problem_is_told(
    changes: Mapping[str, Any],
    capability: tuple[int, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "2.11.0", capability)
    told = problems(run_with(dict(changes)), 1)
    assert any(message in problem for problem in told), told
    assert len(told) == 1 or changes.get("model.kv_channels"), told  # two products have that size


@pytest.mark.parametrize(
    ("changes", "capability"),
    [
        (FP8, (8, 9)),
        ({**FP8, "model.fp8": "e4m3", "model.fp8_recipe": "delayed"}, (8, 9)),
        ({**FP8, "model.fp8_recipe": "blockwise", **LCKV}, HOPPER),
        ({**FP8, "model.fp8_recipe": "mxfp8"}, (10, 3)),
        ({**ALONE, **OVERLAP}, HOPPER),
    ],
)
def test_what_works_is_let_through(
    changes: dict[str, Any], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "2.11.0", capability)
    assert problems(run_with(changes), 2) == []


def test_without_a_gpu_it_is_refused() -> None:
    (told,) = problems(run_with(FP8), 1)
    assert told.startswith("model.fp8 is hybrid, but Transformer Engine needs CUDA. Leave the setting")


@pytest.mark.parametrize(
    ("changes", "version", "message"),
    [
        (FP8, "2.1.0", "model.fp8_recipe is tensorwise, which needs Transformer Engine 2.2, and 2.1.0 is"),
        (
            {**ALONE, **OVERLAP},
            "2.6.0",
            "parallel.tp_comm_overlap is true and model.fp8_passes is no_gradient, which needs Transformer",
        ),
    ],
)
def test_an_old_transformer_engine_is_told(
    changes: dict[str, Any], version: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version, HOPPER)
    (told,) = problems(run_with(changes), 2)
    assert told.startswith(message)
