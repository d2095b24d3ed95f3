"""Training with tokens that are dropped late: the same numbers in every layout, exact resumption, and the
three stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lckv.config import CompressionConfig
from lckv.policies.dms.config import DMSConfig
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.ranks import run_on_ranks
from tests.thinning import thinned

MAPS = {
    "plain": CompressionConfig(),
    "yoco": CompressionConfig(layer_types="0_1_2_2"),
    "lckv": CompressionConfig(layer_types="0_2_2_3", forward_passes=2, backward_passes=2),
}
SOON = DMSConfig(
    stage="finetune",
    target_compression_ratio=4.0,
    decision_scale=10.0,
    initial_decision_offset=0.3,
    temperature=0.5,
    window=3,
)
"""Drops from the first step, so that few steps show something."""
REPORTED = ("lm_", "dms_", "validation", "compression", "target", "grad_norm", "eviction_rate")


def dms_run(
    compression: CompressionConfig, policy: DMSConfig = SOON, **sections: dict[str, Any]
) -> RunConfig:
    run = tiny_run(**{"optimizer": {"lr": 3e-3, "lr_warmup_iters": 0}, **sections})
    return replace(run, compression=replace(compression, policy=policy))


TP2 = ("tp2", 2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}})
TP4 = ("tp4 with 2 KV heads", 4, {"parallel": {"tensor_model_parallel_size": 4}})
PP2 = ("pp2", 2, {"parallel": {"pipeline_model_parallel_size": 2}})
CP2 = ("cp2", 2, {"parallel": {"context_parallel_size": 2}})
FULL = ("recompute full", 1, {"train": {"recompute_granularity": "full"}})
SELECTIVE = ("recompute selective", 1, {"train": {"recompute_granularity": "selective"}})
ONE = ("one micro-batch", 1, {"train": {"micro_batch_size": 4}})
REFERENCE = ("reference attention", 1, {"model": {"attention_backend": "reference"}})
CASES = [
    *(("plain", *layout) for layout in (TP4, PP2, FULL, CP2)),
    *(("yoco", *layout) for layout in (TP2, TP4, PP2, SELECTIVE)),
    *(("lckv", *layout) for layout in (TP4, PP2, CP2, ONE, REFERENCE)),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of each map on one process."""
    folder, files = tmp_path_factory.mktemp("alone"), {}
    for name, compression in MAPS.items():
        files[name] = folder / f"{name}.jsonl"
        run = dms_run(compression, train={"eval_interval": 3, "eval_iters": 1})
        run_on_ranks(1, train, logged_to(run, files[name]))
    return files


@pytest.mark.parametrize(
    ("name", "layout", "ranks", "settings"), thinned(CASES, 3), ids=lambda value: str(value)[:20]
)
def test_nothing_depends_on_the_layout(
    name: str, layout: str, ranks: int, settings: dict, alone: dict[str, Path], tmp_path: Path
) -> None:
    training = {"eval_interval": 3, "eval_iters": 1, **settings.get("train", {})}
    run = dms_run(MAPS[name], **{**settings, "train": training})
    run_on_ranks(ranks, train, logged_to(run, tmp_path / "run.jsonl"))
    for expected, report in zip(reports(alone[name]), reports(tmp_path / "run.jsonl"), strict=True):
        assert expected.keys() == report.keys()
        for key in expected:
            if key.startswith(REPORTED):
                assert report[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), key


def test_it_drops_and_the_loss_pushes(alone: dict[str, Path]) -> None:
    ratios = series(alone["plain"], "compression_ratio")
    assert 1.05 < ratios[0] < 4
    assert ratios[-1] > ratios[0]
    assert series(alone["plain"], "target_compression_ratio") == [4.0] * 6
    losses = series(alone["plain"], "dms_loss")
    assert losses[0] > losses[-1] >= 0
    heads = [key for key in reports(alone["lckv"])[0] if key.startswith("eviction_rate/")]
    assert heads == [f"eviction_rate/layer_{layer}/head_{head}" for layer in (0, 2, 3) for head in (0, 1)]


def test_a_resumed_retrofit_is_bit_equal(tmp_path: Path) -> None:
    policy = replace(SOON, stage="retrofit", initial_compression_ratio=1.5, ramp=0.5)
    sections = {"parallel": {"pipeline_model_parallel_size": 2}, "train": {"precision": "bf16"}}
    saving = {"save": str(tmp_path / "a"), "save_interval": 3}
    run_on_ranks(
        2,
        train,
        logged_to(dms_run(MAPS["yoco"], policy, **sections, checkpoint=saving), tmp_path / "a.jsonl"),
    )
    loading = {"load": str(tmp_path / "a" / "iter_0000003")}
    run_on_ranks(
        2,
        train,
        logged_to(dms_run(MAPS["yoco"], policy, **sections, checkpoint=loading), tmp_path / "b.jsonl"),
    )
    for name in (
        "lm_loss",
        "dms_loss",
        "grad_norm",
        "eviction_rate/layer_2/head_1",
        "target_compression_ratio",
    ):
        assert series(tmp_path / "b.jsonl", name) == series(tmp_path / "a.jsonl", name)[3:]
    asked = series(tmp_path / "a.jsonl", "target_compression_ratio")
    assert asked == pytest.approx([1.5, 1.5 + 2.5 / 3, 1.5 + 5 / 3, 4.0, 4.0, 4.0])


def test_three_stages(tmp_path: Path) -> None:
    """A plain model is trained, its borrowed channel faded and zeroed, then it learns to drop."""
    tiny = {"train": {"train_iters": 4}}
    run_on_ranks(1, train, tiny_run(**tiny, checkpoint={"save": str(tmp_path / "dense")}))
    early = dms_run(MAPS["plain"], replace(SOON, stage="retrofit"))
    loading = replace(early.checkpoint, load=str(tmp_path / "dense"), finetune=True)
    with pytest.raises(
        ConfigError, match=r"dms, stage retrofit, but .* is dense: .*Run stage zero_out first"
    ):
        run_on_ranks(1, train, replace(early, checkpoint=loading))
    stages = [("zero_out", "dense"), ("retrofit", "zero_out"), ("finetune", "retrofit")]
    for stage, before in stages:
        checkpoint = {"load": str(tmp_path / before), "save": str(tmp_path / stage), "finetune": True}
        run = dms_run(MAPS["plain"], replace(SOON, stage=stage), **tiny, checkpoint=checkpoint)
        run_on_ranks(1, train, logged_to(run, tmp_path / f"{stage}.jsonl"))
    assert "dms_loss" not in reports(tmp_path / "zero_out.jsonl")[0]
    assert series(tmp_path / "retrofit.jsonl", "target_compression_ratio") == [1.0, 1.75, 2.5, 3.25]
    assert series(tmp_path / "finetune.jsonl", "target_compression_ratio") == [4.0] * 4
    count, largest = run_on_ranks(1, borrowed_rows, str(tmp_path / "zero_out"))[0]
    assert count == 4 * 2 and largest == 0.0
    assert run_on_ranks(1, borrowed_rows, str(tmp_path / "dense"))[0][1] > 0
    backwards = tiny_run(checkpoint={"load": str(tmp_path / "finetune"), "finetune": True})
    with pytest.raises(ConfigError, match=r"policy is dense, but the checkpoint's is dms, stage finetune"):
        run_on_ranks(1, train, backwards)


def borrowed_rows(checkpoint: str) -> tuple[int, float]:
    """How many there are, and their largest weight."""
    from megatron_ext.config import ParallelConfig
    from megatron_ext.model.channel_rows import StageChannelRows
    from megatron_ext.parallel.process_groups import initialize
    from megatron_ext.restoring.model import restore

    initialize(ParallelConfig(), seed=1)
    rows = list(StageChannelRows(restore(Path(checkpoint), ParallelConfig()).stage)("first query", -1))
    return len(rows), max(row.abs().max().item() for row in rows)
