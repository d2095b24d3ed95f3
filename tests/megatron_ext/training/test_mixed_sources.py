"""Runs of maps whose layers mix keys and values of others into their own: nothing depends on the layout, a
resumed run is the uninterrupted one, and weight decay leaves the weights alone that mix."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lckv.config import CompressionConfig
from lckv.policies.dms.config import DMSConfig
from megatron_ext.config import OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ext.model.build import wrap
from megatron_ext.training.optimizer import build_optimizer
from tests.megatron_ext.model.stages import MAPS, make_stage
from tests.megatron_ext.training.runs import logged_to, series, tiny_run, train
from tests.ranks import run_on_ranks

DMS = DMSConfig(
    stage="finetune", target_compression_ratio=4.0, decision_scale=10.0, initial_decision_offset=0.3,
    temperature=0.5, window=3,
)  # fmt: skip
"""Drops from the first step."""
MIXED = CompressionConfig(layer_types="0_1+0_2+1_2", mix_scaling_factor=5.0, policy=DMS)


def mixed_run(**sections: dict[str, Any]) -> RunConfig:
    run = tiny_run(**{"optimizer": {"lr": 3e-3, "lr_warmup_iters": 0}, **sections})
    return replace(run, compression=MIXED)


def test_nothing_depends_on_the_layout(tmp_path: Path) -> None:
    alone, split = tmp_path / "alone.jsonl", tmp_path / "split.jsonl"
    run_on_ranks(1, train, logged_to(mixed_run(), alone))
    parallel = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    }
    run_on_ranks(4, train, logged_to(mixed_run(parallel=parallel), split))
    for name in ("lm_loss", "dms_loss", "grad_norm"):
        assert series(split, name) == pytest.approx(series(alone, name), rel=1e-4)


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    sections = {"parallel": {"pipeline_model_parallel_size": 2}, "train": {"precision": "bf16"}}
    saving = {"save": str(tmp_path / "a"), "save_interval": 3}
    loading = {"load": str(tmp_path / "a" / "iter_0000003")}
    for name, checkpoint in (("a", saving), ("b", loading)):
        run = mixed_run(**sections, checkpoint=checkpoint)
        run_on_ranks(2, train, logged_to(run, tmp_path / f"{name}.jsonl"))
    for name in ("lm_loss", "dms_loss", "grad_norm"):
        whole, rest = (series(tmp_path / f"{part}.jsonl", name) for part in "ab")
        assert len(rest) == len(whole) - 3 and whole[3:] == rest


def test_weights_that_mix_do_not_decay() -> None:
    (shrunk,) = run_on_ranks(1, weights_that_shrink)
    assert any(name.endswith("linear_proj.weight") for name in shrunk)
    assert not [name for name in shrunk if name.endswith(("key_weight", "value_weight"))]


def weights_that_shrink() -> list[str]:
    """In a step in which all gradients are 0."""
    parallel, training = ParallelConfig(), TrainConfig(precision="fp32")
    model = wrap(make_stage(MAPS["mixed"], parallel, training), parallel, training)
    settings = OptimizerConfig(weight_decay=0.1, lr=0.1, lr_warmup_iters=0)
    optimizer, scheduler = build_optimizer(settings, parallel, training, model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scheduler.step(1)
    optimizer.step()
    return [name for name, parameter in model.named_parameters() if not parameter.equal(before[name])]
