"""Training with merged keys and values: the same numbers in every layout, exact resumption, and the three
stages."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.schedule.statistics_meter import NonFiniteStatisticError
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.ranks import run_on_ranks
from tests.thinning import thinned

MAPS = {
    "plain": CompressionConfig(),
    "yoco": CompressionConfig(layer_types="0_1_2_2"),
    "lckv": CompressionConfig(layer_types="0_2_2_3", forward_passes=2, backward_passes=2),
}
SOON = DMCConfig(
    stage="finetune", target_compression_ratio=4.0, initial_decision_bias=0.3, temperature=0.5, window=4
)
"""Merges from the first step, so that few steps show something."""


def dmc_run(
    compression: CompressionConfig, policy: DMCConfig = SOON, **sections: dict[str, Any]
) -> RunConfig:
    run = tiny_run(**{"optimizer": {"lr": 3e-3, "lr_warmup_iters": 0}, **sections})
    return replace(run, compression=replace(compression, policy=policy))


LAYOUTS = [
    ("tp2", 2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    ("tp4 with 2 KV heads", 4, {"parallel": {"tensor_model_parallel_size": 4}}),
    ("dp2", 2, {"train": {"micro_batch_size": 2}}),
    ("one micro-batch", 1, {"train": {"micro_batch_size": 4}}),
    ("recompute full", 1, {"train": {"recompute_granularity": "full"}}),
    ("recompute selective", 1, {"train": {"recompute_granularity": "selective"}}),
    ("reference attention", 1, {"model": {"attention_backend": "reference"}}),
]
PIPELINES = [
    ("pp2", 2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    ("pp4", 4, {"parallel": {"pipeline_model_parallel_size": 4}}),
    ("tp2 pp2", 4, {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}),
]
RINGS = [
    *PIPELINES,
    (
        "interleaved",
        2,
        {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}},
    ),
    (
        "pp2, recomputed",
        2,
        {
            "parallel": {"pipeline_model_parallel_size": 2, "pipeline_in_flight": 1},
            "train": {"recompute_granularity": "full"},
        },
    ),
]
CASES = [(name, *layout) for name in MAPS for layout in LAYOUTS]
CASES += [(name, *layout) for name in ("plain", "yoco") for layout in PIPELINES]
CASES += [("lckv", *layout) for layout in RINGS]
CASES += [("lckv", "cp2 dp2", 4, {"parallel": {"context_parallel_size": 2}})]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of each map on one process."""
    folder, files = tmp_path_factory.mktemp("alone"), {}
    for name, compression in MAPS.items():
        files[name] = folder / f"{name}.jsonl"
        run = dmc_run(compression, train={"eval_interval": 3, "eval_iters": 1})
        run_on_ranks(1, train, logged_to(run, files[name]))
    return files


@pytest.mark.parametrize(
    ("name", "layout", "world_size", "settings"), thinned(CASES, 3), ids=lambda value: str(value)[:20]
)
def test_nothing_depends_on_the_layout(
    name: str, layout: str, world_size: int, settings: dict, alone: dict[str, Path], tmp_path: Path
) -> None:
    training = {"eval_interval": 3, "eval_iters": 1, **settings.get("train", {})}
    run = dmc_run(MAPS[name], **{**settings, "train": training})
    run_on_ranks(world_size, train, logged_to(run, tmp_path / "run.jsonl"))
    for expected, found in zip(reports(alone[name]), reports(tmp_path / "run.jsonl"), strict=True):
        assert expected.keys() == found.keys()
        for key in expected:
            if key.startswith(
                ("lm_", "dmc_", "validation", "compression", "target", "grad_norm", "merge_rate")
            ):
                assert found[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), key


def test_it_merges_and_the_loss_pushes(alone: dict[str, Path]) -> None:
    ratios = series(alone["plain"], "compression_ratio")
    assert 1.05 < ratios[0] < 4
    assert ratios[-1] > ratios[0]
    assert series(alone["plain"], "target_compression_ratio") == [4.0] * 6
    losses = series(alone["plain"], "dmc_loss")
    assert losses[0] > losses[-1] > 0
    heads = [key for key in reports(alone["lckv"])[0] if key.startswith("merge_rate/")]
    assert heads == [f"merge_rate/layer_{layer}/head_{head}" for layer in (0, 2, 3) for head in (0, 1)]


def test_the_loss_per_rank_of_the_public_code_depends_on_the_layout(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        policy = replace(SOON, loss_per_tp_rank=True, target_compression_ratio=1.65)
        settings = {"parallel": {"tensor_model_parallel_size": ranks}, "train": {"train_iters": 1}}
        run = dmc_run(MAPS["plain"], policy, **settings)
        run_on_ranks(ranks, train, logged_to(run, tmp_path / f"{ranks}.jsonl"))
        found.append(series(tmp_path / f"{ranks}.jsonl", "dmc_loss")[0])
    assert found[1] > found[0] + 1e-6, "a hinge of parts is at least the hinge of the whole"


@pytest.mark.parametrize(
    ("world_size", "layout"), [(2, {}), (2, {"pipeline_model_parallel_size": 2})], ids=["dp2", "pp2"]
)
def test_a_resumed_retrofit_is_bit_equal(tmp_path: Path, world_size: int, layout: dict) -> None:
    policy = replace(SOON, stage="retrofit")
    sections = {"parallel": layout, "train": {"precision": "bf16"}}
    straight = dmc_run(
        MAPS["yoco"], policy, **sections, checkpoint={"save": str(tmp_path / "a"), "save_interval": 3}
    )
    run_on_ranks(world_size, train, logged_to(straight, tmp_path / "a.jsonl"))
    loading = {"load": str(tmp_path / "a" / "iter_0000003"), "save": str(tmp_path / "b")}
    resumed = dmc_run(MAPS["yoco"], policy, **sections, checkpoint=loading)
    run_on_ranks(world_size, train, logged_to(resumed, tmp_path / "b.jsonl"))
    parts = reports(tmp_path / "a.jsonl")[3:], reports(tmp_path / "b.jsonl")
    exact = [
        key
        for key in parts[0][0]
        if key.startswith(("lm_", "dmc_", "grad_norm", "merge_rate", "compression"))
    ]
    first, second = ([[line[key] for key in exact] for line in part] for part in parts)
    assert first == second
    entries = [
        json.loads((tmp_path / run / "iter_0000006" / "manifest.json").read_text())["files"] for run in "ab"
    ]
    shards = [
        {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}
        for files in entries
    ]
    assert shards[0] == shards[1]


def test_three_stages(tmp_path: Path) -> None:
    """A plain model is trained, its decision channel faded and zeroed, then it learns to merge."""
    tiny = {"train": {"train_iters": 4}}
    dense = tiny_run(**tiny, checkpoint={"save": str(tmp_path / "dense")})
    run_on_ranks(2, train, dense)
    stages = [("zero_out", "dense"), ("retrofit", "zero_out"), ("finetune", "retrofit")]
    for stage, before in stages:
        checkpoint = {"load": str(tmp_path / before), "save": str(tmp_path / stage), "finetune": True}
        evaluation = {"train": {"train_iters": 4, "eval_interval": 4, "eval_iters": 1}}
        run = dmc_run(MAPS["plain"], replace(SOON, stage=stage), **evaluation, checkpoint=checkpoint)
        run_on_ranks(2, train, logged_to(run, tmp_path / f"{stage}.jsonl"))
    assert "dmc_loss" not in reports(tmp_path / "zero_out.jsonl")[0]
    assert series(tmp_path / "retrofit.jsonl", "target_compression_ratio") == [1.0, 1.75, 2.5, 3.25]
    assert series(tmp_path / "finetune.jsonl", "target_compression_ratio") == [4.0] * 4
    assert run_on_ranks(1, largest_decision_weight, str(tmp_path / "zero_out")) == [0.0]
    assert run_on_ranks(4, largest_decision_weight, str(tmp_path / "zero_out"), 4) == [0.0] * 4
    assert run_on_ranks(1, largest_decision_weight, str(tmp_path / "dense"))[0] > 0


def largest_decision_weight(checkpoint: str, tp: int = 1) -> float:
    from megatron_ext.config import ParallelConfig
    from megatron_ext.model.channel_rows import StageChannelRows
    from megatron_ext.parallel.process_groups import initialize
    from megatron_ext.restoring.model import restore

    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    initialize(parallel, seed=1)
    channel_rows = StageChannelRows(restore(Path(checkpoint), parallel).stage)
    rows = [row for kind in ("query", "key") for row in channel_rows(kind, -1)]
    assert tp > 1 or len(rows) == 4 * (4 + 2)
    return max((row.abs().max().item() for row in rows), default=0.0)


@pytest.fixture(scope="module")
def dense_and_merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of a dense run and one of a run that merges."""
    folder = tmp_path_factory.mktemp("stages")
    short = {"train": {"train_iters": 1}}
    run_on_ranks(
        1,
        train,
        tiny_run(**short, optimizer={"lr_warmup_iters": 0}, checkpoint={"save": str(folder / "dense")}),
    )
    merging = dmc_run(MAPS["plain"], SOON, **short, checkpoint={"save": str(folder / "dmc")})
    run_on_ranks(1, train, merging)
    return folder


class TestSuccession:
    def test_a_decision_channel_in_use(self, dense_and_merged: Path) -> None:
        loading = {"load": str(dense_and_merged / "dense"), "finetune": True}
        run = dmc_run(MAPS["plain"], replace(SOON, stage="retrofit"), checkpoint=loading)
        with pytest.raises(
            ConfigError,
            match=r"policy is dmc, stage retrofit, but the checkpoint's is dense: .*Run stage zero_out",
        ):
            run_on_ranks(1, train, run)

    def test_a_model_that_merges_is_no_dense_model(self, dense_and_merged: Path) -> None:
        run = tiny_run(checkpoint={"load": str(dense_and_merged / "dmc"), "finetune": True})
        with pytest.raises(
            ConfigError, match=r"compression\.policy is dense, but the checkpoint's is dmc, stage finetune"
        ):
            run_on_ranks(1, train, run)

    def test_another_stage_is_another_run(self, dense_and_merged: Path) -> None:
        run = dmc_run(
            MAPS["plain"], replace(SOON, stage="retrofit"), checkpoint={"load": str(dense_and_merged / "dmc")}
        )
        with pytest.raises(
            ConfigError, match=r"To start the next stage from its weights, set checkpoint\.finetune to true"
        ):
            run_on_ranks(1, train, run)


def test_odd_decisions_stop_the_run_and_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteStatisticError,
        match=r"iteration 1: merge_rate of layer 2 KV head 1\b.* is not finite",
    ):
        run_on_ranks(2, train_with_a_broken_head)


def train_with_a_broken_head() -> int:
    from megatron_ext.model import build
    from megatron_ext.training import loop

    def broken(*args: Any, **kwargs: Any) -> torch.nn.Module:
        stage = build.build_stage(*args, **kwargs)
        weight = stage.decoder.layers[
            2
        ].self_attention.linear_qkv.weight  # rows: per KV head 2 queries, key, value of 8 channels
        weight.data[32 + 16 + 7] = torch.nan
        return stage

    loop.build_stage, original = broken, loop.build_stage
    try:
        return train(dmc_run(MAPS["plain"]))
    finally:
        loop.build_stage = original
