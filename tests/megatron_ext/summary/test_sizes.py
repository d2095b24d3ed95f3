"""Sizes of a run that are computed from its settings."""

import subprocess
import sys
from dataclasses import replace

import pytest

from lckv.config import CompressionConfig
from lckv.policies.dms.config import DMSConfig
from megatron_ext.config import ParallelConfig
from megatron_ext.data.order import SourceUse
from megatron_ext.model.cost import model_shape
from megatron_ext.summary.lines import cost_lines, data_lines, model_lines
from megatron_ext.summary.sizes import RunSizes, recomputed_layers
from tests.megatron_ext.training.runs import tiny_run


def test_steps_are_listed_where_layers_are_iterated() -> None:
    run = replace(tiny_run(), compression=CompressionConfig("0_2_2_3", forward_passes=2, backward_passes=1))
    shape = model_shape(run.model, vocab_size=128, seq_length=run.train.seq_length)
    lines = list(cost_lines(RunSizes(run, shape, 1, 0)))
    assert [line.split("  ")[0] for line in lines[-2:]] == ["predicted prompt", "FLOPs per token"]
    assert lines[1:-2] == [
        "steps                 layer 0, once",
        (
            "                      layers 1-2, pass 1 of 3, without gradient, for the next pass: KV of 2; "
            "layer 1 without attention"
        ),
        "                      layers 1-2, pass 2 of 3, without gradient, for the next pass: KV of 2",
        "                      layers 1-2, pass 3 of 3, with gradient, counts",
        "                      layer 3, once",
    ]
    assert len(list(cost_lines(RunSizes(tiny_run(), shape, 1, 0)))) == 3


def test_what_is_trained_is_said_where_it_is_not_all() -> None:
    policy = DMSConfig(stage="retrofit", decision_source="adapter")
    adapting = replace(tiny_run(), compression=CompressionConfig("0_0_2_2", policy=policy))
    shape = model_shape(adapting.model, vocab_size=128, seq_length=adapting.train.seq_length)
    frozen = replace(adapting, train=replace(adapting.train, trainable="policy"))
    assert not any(line.startswith("trained") for line in model_lines(RunSizes(adapting, shape, 1, 0)))
    own = 2 * (adapting.model.query_groups + 1) * adapting.model.hidden_size
    assert f"trained               the KV policy's own {own:,} of them, all others are frozen" in list(
        model_lines(RunSizes(frozen, shape, 1, 0))
    )


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, 4),
        ({"num_distributed_optimizer_instances": 2}, 2),
        ({"use_distributed_optimizer": False}, 1),
    ],
)
def test_over_how_many_ranks_the_optimizer_is_shared_out(parallel: dict[str, int], expected: int) -> None:
    run = tiny_run(parallel={"tensor_model_parallel_size": 2, **parallel})
    shape = model_shape(run.model, vocab_size=128, seq_length=run.train.seq_length)
    assert RunSizes(run, shape, 8, 0).optimizer_ranks == expected


def test_epochs_of_datasets() -> None:
    one, mock = [SourceUse("d/a", 35, 10)], [SourceUse("data.mock", 7, 0)]
    assert list(data_lines({"train": one, "valid": mock}, 8)) == [
        "train data            280 tokens, 3.50 epochs of d/a",
        "valid data            56 tokens, new ones without end (data.mock)",
    ]
    many = [SourceUse(f"d/{number}", 10, 20 - number) for number in range(14)]
    lines = list(data_lines({"train": many}, 8))
    assert lines[0] == "train data            1,120 tokens of 14 datasets"
    assert lines[1] == "                        7.1%, 0.50 epochs of d/0"
    assert lines[11:] == ["                      and 4 more, at most 1.43 epochs of d/13"]


def test_lines_need_neither_torch_nor_megatron() -> None:
    script = "import sys, megatron_ext.summary.lines; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_layers_that_run_again_in_backward() -> None:
    for granularity, count, stages, expected in [
        ("none", None, 1, 0),
        ("full", None, 2, 4),
        ("full", 1, 2, 2),
    ]:
        run = tiny_run(train={"recompute_granularity": granularity, "recompute_num_layers": count})
        run = replace(run, parallel=ParallelConfig(pipeline_model_parallel_size=stages))
        assert recomputed_layers(run) == expected
