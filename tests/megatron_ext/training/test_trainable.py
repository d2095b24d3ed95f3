"""Training of a KV policy's own parameters alone: the others stay as they are, and need no memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lckv.config import CompressionConfig
from lckv.policies.dms.config import DMSConfig
from megatron_ext.checkpointing.errors import MismatchError
from megatron_ext.config import ParallelConfig, RunConfig, TrainConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.build import wrap
from megatron_ext.training.optimizer import build_optimizer
from tests.megatron_ext.model.stages import make_stage
from tests.megatron_ext.training.runs import logged_to, reports, series, tiny_run, train
from tests.ranks import run_on_ranks
from tests.thinning import thinned

POLICY = DMSConfig(
    stage="retrofit",
    decision_source="adapter",
    target_compression_ratio=4.0,
    decision_scale=10.0,
    initial_decision_offset=0.3,
    temperature=0.5,
    window=3,
)
OWN = ("dms_proj_alpha.weight", "dms_proj_alpha_norm.weight")
YOCO, LCKV = "0_1_2_2", "0_2_2_3"


def frozen_run(layer_types: str = YOCO, **sections: dict[str, Any]) -> RunConfig:
    training = {"trainable": "policy", **sections.pop("train", {})}
    optimizer = {"lr": 3e-2, "lr_warmup_iters": 0, "weight_decay": 0.5}
    run = tiny_run(**{"optimizer": optimizer, **sections, "train": training})
    return replace(run, compression=CompressionConfig(layer_types=layer_types, policy=POLICY))


LAYOUTS = {
    "tp2, recomputed": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}, YOCO),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}, YOCO),
    "dp2": (2, {}, LCKV),
    "tp2 pp2": (4, {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}, LCKV),
}


@pytest.mark.parametrize("name", thinned(LAYOUTS, 3))
def test_nothing_depends_on_the_layout(name: str, tmp_path: Path) -> None:
    ranks, sections, layer_types = LAYOUTS[name]
    run_on_ranks(1, train, logged_to(frozen_run(layer_types), tmp_path / "alone.jsonl"))
    recomputed = {"train": {"recompute_granularity": "full"}} if "recomputed" in name else {}
    run = frozen_run(layer_types, **sections, **recomputed)
    run_on_ranks(ranks, train, logged_to(run, tmp_path / "run.jsonl"))
    losses = series(tmp_path / "alone.jsonl", "dms_loss")
    assert losses[0] != losses[-1]
    for expected, report in zip(
        reports(tmp_path / "alone.jsonl"), reports(tmp_path / "run.jsonl"), strict=True
    ):
        for key in ("lm_loss", "dms_loss", "grad_norm", "compression_ratio"):
            assert report[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), key


@pytest.mark.parametrize("precision", thinned(["fp32", "bf16"], 2))
def test_the_others_stay_bit_for_bit_and_a_resumed_run_is_exact(precision: str, tmp_path: Path) -> None:
    sections = {"parallel": {"pipeline_model_parallel_size": 2}, "train": {"precision": precision}}
    saving = {"save": str(tmp_path / "a"), "save_interval": 3}
    whole = frozen_run(**sections, checkpoint=saving)
    run_on_ranks(2, train, logged_to(whole, tmp_path / "a.jsonl"))
    loading = {"load": str(tmp_path / "a" / "iter_0000003"), "save": str(tmp_path / "b")}
    resumed = frozen_run(**sections, checkpoint=loading)
    run_on_ranks(2, train, logged_to(resumed, tmp_path / "b.jsonl"))
    for name in ("lm_loss", "dms_loss", "grad_norm"):
        assert series(tmp_path / "b.jsonl", name) == series(tmp_path / "a.jsonl", name)[3:]
    if precision == "fp32":
        everything = replace(resumed, train=replace(resumed.train, trainable="all"))
        with pytest.raises(MismatchError, match=r"optimizer(?s:.*)train\.trainable as in its config\.json"):
            run_on_ranks(2, train, everything)
    weights = [weights_of(tmp_path / folder) for folder in ("a/iter_0000003", "a/iter_0000006", "b")]
    (begun,) = run_on_ranks(1, initial_weights, whole)
    assert weights[0].keys() == weights[1].keys() == begun.keys()
    for name, before in begun.items():
        assert torch.equal(weights[1][name], weights[2][name])
        stays = not name.endswith(OWN)
        assert torch.equal(weights[1][name], before) == stays, name
        assert torch.equal(weights[1][name], weights[0][name]) == stays, name


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """By canonical names."""
    from checkpoints_conversion.opening import open_megatron

    source = open_megatron(checkpoint).source
    return {name: source.read(name) for name in source.infos()}


def initial_weights(run: RunConfig) -> dict[str, Tensor]:
    from megatron_ext.model.build import build_stage
    from megatron_ext.model.initialization import global_parameters
    from megatron_ext.parallel.process_groups import initialize

    initialize(ParallelConfig(), run.train.seed)
    stage = build_stage(run.model, run.compression, ParallelConfig(), run.train, vocab_size=97)
    return {
        name: parameter.detach()[:97]
        if "word_embeddings" in name or "output_layer" in name
        else parameter.detach()
        for name, parameter in global_parameters(stage)
    }


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_has_no_gradients_and_no_optimizer_state(precision: str, distributed: bool) -> None:
    (found,) = run_on_ranks(1, buffers, precision, distributed)
    # Megatron pads what it cuts over ranks
    assert found["expected"] <= found["gradients"] < 1.5 * found["expected"]
    assert found["expected"] <= found["moments"] < 1.5 * found["expected"]
    assert found["all"] > 100 * found["expected"]


def buffers(precision: str, distributed: bool) -> dict[str, int]:
    """On every rank: how many numbers there are, in what is trained, in gradient buffers and in moments."""
    parallel = ParallelConfig(use_distributed_optimizer=distributed)
    training = TrainConfig(precision=precision, trainable="policy")
    model = wrap(
        make_stage(CompressionConfig("0_0_2_2_4_4", policy=POLICY), parallel, training), parallel, training
    )
    run = frozen_run()
    optimizer, _ = build_optimizer(run.optimizer, parallel, training, model)
    for buffer in model.buffers:
        buffer.grad_data.fill_(1e-3)
    optimizer.step()
    moments = [
        entry.numel()
        for part in optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for name, entry in state.items()
        if name == "exp_avg"
    ]
    return {
        "gradients": sum(buffer.grad_data.numel() for buffer in model.buffers),
        "moments": sum(moments),
        "expected": 3 * 32 * (2 + 1),
        "all": sum(parameter.numel() for parameter in model.parameters()),
    }


def test_a_stage_that_has_nothing_to_train(tmp_path: Path) -> None:
    layout = {"parallel": {"pipeline_model_parallel_size": 2}}
    run_on_ranks(1, train, logged_to(frozen_run("0_1_1_1"), tmp_path / "alone.jsonl"))
    run = frozen_run("0_1_1_1", **layout, checkpoint={"save": str(tmp_path / "a"), "save_interval": 3})
    run_on_ranks(2, train, logged_to(run, tmp_path / "a.jsonl"))
    for name in ("lm_loss", "dms_loss", "grad_norm"):
        assert series(tmp_path / "a.jsonl", name) == pytest.approx(
            series(tmp_path / "alone.jsonl", name), rel=2e-4
        )
    loading = {"load": str(tmp_path / "a" / "iter_0000003")}
    run_on_ranks(
        2, train, logged_to(frozen_run("0_1_1_1", **layout, checkpoint=loading), tmp_path / "b.jsonl")
    )
    assert series(tmp_path / "b.jsonl", "dms_loss") == series(tmp_path / "a.jsonl", "dms_loss")[3:]


def test_a_checkpoint_without_them_is_told_where_they_come_from(tmp_path: Path) -> None:
    saving = {"save": str(tmp_path / "a")}
    plain = tiny_run(train={"train_iters": 3}, compression={"layer_types": YOCO}, checkpoint=saving)
    run_on_ranks(1, train, plain)
    adapting = frozen_run(checkpoint={"load": str(tmp_path / "a"), "finetune": True})
    said = (
        r"missing there: .*dms_proj_alpha(?s:.*)are added by conversion: lckv-megatron convert megatron-to-hf"
    )
    with pytest.raises(MismatchError, match=said):
        run_on_ranks(1, train, adapting)


def test_a_policy_without_parameters_is_refused() -> None:
    run = frozen_run()
    borrowing = replace(run.compression, policy=replace(POLICY, decision_source="borrowed_channel"))
    tp2 = ParallelConfig(tensor_model_parallel_size=2)
    of_layers = replace(borrowing, policy=replace(borrowing.policy, decisions_per="layer"))
    together = replace(run, compression=of_layers, parallel=tp2, train=replace(run.train, trainable="all"))
    with pytest.raises(
        ConfigError, match=r"tensor_model_parallel_size is 2 and compression\.policy is dms, .*another"
    ):
        run_on_ranks(2, train, together)
    with pytest.raises(
        ConfigError, match=r"train\.trainable is policy, and compression\.policy is dms, stage .*has no"
    ):
        run_on_ranks(1, train, replace(run, compression=borrowing))
