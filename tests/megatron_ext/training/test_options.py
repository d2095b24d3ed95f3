"""Options of Megatron's data parallelism and optimizer: what they are set to arrives, and losses stay."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import optimizer_config
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_ext.config import RunConfig
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.parallel.process_groups import initialize
from megatron_ext.training import loop, step
from megatron_ext.training.optimizer import build_optimizer
from tests.megatron_ext.training.runs import logged_to, series, tiny_run, train
from tests.ranks import run_on_ranks

YOCO = {"layer_types": "0s_1s_2_2", "sliding_window": 8}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SMALL_BUCKETS = {**OVERLAP, "ddp_bucket_size": 1000, "ddp_pad_buckets_for_high_nccl_busbw": True}
ALIGNED = {**OVERLAP, "ddp_bucket_size": 1000, "align_param_gather": True}
INSTANCES = {"num_distributed_optimizer_instances": 2}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    path = tmp_path_factory.mktemp("one") / "reports.jsonl"
    run_on_ranks(1, train, logged_to(tiny_run(compression=YOCO), path))
    return {name: series(path, name) for name in ("lm_loss", "grad_norm")}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, SMALL_BUCKETS),
        (4, {**ALIGNED, "pipeline_model_parallel_size": 2}),
        (4, {**INSTANCES, **OVERLAP}),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_the_options(
    one_rank: dict[str, list[float]], world_size: int, parallel: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "reports.jsonl"
    run_on_ranks(world_size, train, logged_to(tiny_run(compression=YOCO, parallel=parallel), path))
    for name, expected in one_rank.items():
        assert len(expected) == 6
        assert series(path, name) == pytest.approx(expected, rel=2e-5), name


def test_a_run_with_several_optimizer_instances_resumes(
    one_rank: dict[str, list[float]], tmp_path: Path
) -> None:
    found = check_resumed(4, train, {"parallel": INSTANCES}, tmp_path)
    for name, expected in one_rank.items():
        assert found[name] == pytest.approx(expected, rel=2e-5), name


def check_resumed(
    world_size: int, fit: Any, sections: dict[str, Any], folder: Path
) -> dict[str, list[float]]:
    """Iterations 4 to 6 from the checkpoint of iteration 3 are those of the run that goes straight on, which
    this returns."""
    saving = {"save": str(folder / "run"), "save_interval": 3}
    straight = tiny_run(compression=YOCO, checkpoint=saving, **sections)
    run_on_ranks(world_size, fit, logged_to(straight, folder / "straight.jsonl"))
    loading = {"load": str(folder / "run" / "iter_0000003")}
    resumed = tiny_run(compression=YOCO, checkpoint=loading, **sections)
    run_on_ranks(world_size, fit, logged_to(resumed, folder / "resumed.jsonl"))
    for name in ("lm_loss", "grad_norm"):
        found = series(folder / "resumed.jsonl", name)
        assert len(found) == 3
        assert found == series(folder / "straight.jsonl", name)[3:], name
    return {name: series(folder / "straight.jsonl", name) for name in ("lm_loss", "grad_norm")}


OFFLOADED = {
    "use_precision_aware_optimizer": True,
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
}


def test_the_offloaded_optimizer_does_the_same_and_resumes(tmp_path: Path) -> None:
    """On the CPU, where validation refuses it."""
    bf16 = {"precision": "bf16"}
    sections = {"train": bf16, "optimizer": {**OFFLOADED, "overlap_cpu_optimizer_d2h_h2d": True}}
    found = check_resumed(2, train_offloaded, sections, tmp_path)
    plain = tmp_path / "plain.jsonl"
    run_on_ranks(2, train, logged_to(tiny_run(compression=YOCO, train=bf16), plain))
    for name, values in found.items():
        assert values == pytest.approx(series(plain, name), rel=2e-3), name  # bf16 weights


@contextmanager
def on_a_gpu() -> Iterator[pytest.MonkeyPatch]:
    """For Megatron's offloading: weights in 16 bits are on a GPU, their copies in 32 bits on the host.
    Transformer Engine is there: Megatron asks for its version even where the host's Adam is used."""
    groups_of = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def groups(optimizer: Any, fraction: float) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            is_cuda = property(lambda tensor: tensor.dtype == torch.bfloat16)
            patch.setattr(torch.Tensor, "is_cuda", is_cuda, raising=False)
            patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor, raising=False)
            return groups_of(optimizer, fraction)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
        patch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", groups)
        yield patch


def train_offloaded(run: RunConfig) -> None:
    initialize(run.parallel, run.train.seed)
    optimizers: list[object] = []
    build = loop.build_optimizer

    def noting(*arguments: Any) -> Any:
        built = build(*arguments)
        optimizers.append(built[0])
        return built

    with on_a_gpu() as patch:
        patch.setattr(loop, "build_optimizer", noting)
        loop.fit(run)
    (leaf,) = optimizers[0].chained_optimizers
    assert isinstance(leaf.optimizer, HybridDeviceOptimizer)
    assert leaf.optimizer.gpu_optimizer is None and len(leaf.optimizer.cpu_optimizers) > 1
    assert leaf.optimizer.gpu_params_map_cpu_copy


def test_a_checkpoint_before_the_first_step_of_an_offloaded_optimizer_keeps_the_weights() -> None:
    assert run_on_ranks(1, weights_moved_by_saving) == [0.0]


def weights_moved_by_saving() -> float:
    from megatron_ext.checkpointing.state import sharded_state

    run = tiny_run(compression=YOCO, train={"precision": "bf16"}, optimizer=OFFLOADED)
    initialize(run.parallel, run.train.seed)
    model = wrap(build(run), run.parallel, run.train)
    with on_a_gpu():
        optimizer, _ = build_optimizer(run.optimizer, run.parallel, run.train, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sharded_state([model], optimizer)
    return max(
        (parameter - old).abs().max().item()
        for parameter, old in zip(model.parameters(), before, strict=True)
    )


def build(run: RunConfig) -> Any:
    return build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=97)


def test_all_weights_are_gathered_at_the_beginning_of_an_aligned_step(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    run_on_ranks(2, note_calls, tiny_run(compression=YOCO, parallel=ALIGNED), path)
    calls = json.loads(path.read_text())
    assert calls == ["gather", "forward"] * 6


def note_calls(run: RunConfig, path: Path) -> None:
    """Gathers of all weights, and schedules that run after them."""
    calls: list[str] = []
    gather, schedule = DistributedDataParallel.start_param_sync, step.run_schedule

    def noting_gather(model: Any, *arguments: Any, **options: Any) -> Any:
        if not options.get("force_sync"):
            calls.append("gather")
        return gather(model, *arguments, **options)

    def noting_schedule(*arguments: Any, **options: Any) -> Any:
        (model, *_) = arguments
        groups = model.bucket_groups
        assert len(groups) > 2
        assert all(group.param_gather_handle is not None for group in groups)
        calls.append("forward")
        return schedule(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedDataParallel, "start_param_sync", noting_gather)
        patch.setattr(step, "run_schedule", noting_schedule)
        train(run)
    if torch.distributed.get_rank() == 0:
        path.write_text(json.dumps(calls))


def test_what_is_set_arrives_at_megatron() -> None:
    run_on_ranks(2, compare_with_megatron)


def compare_with_megatron() -> None:
    run = tiny_run(
        compression=YOCO,
        parallel={**SMALL_BUCKETS, "align_param_gather": True, **INSTANCES},
        train={"precision": "bf16"},
        optimizer={**OFFLOADED, "optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True},
    )
    initialize(run.parallel, run.train.seed)
    model = wrap(build(run), run.parallel, run.train)
    config = model.ddp_config
    assert config.bucket_size == model.bucket_size == 1000
    assert config.pad_buckets_for_high_nccl_busbw
    assert all(bucket.grad_data.numel() % 2**16 == 0 for bucket in buckets_of(model))
    assert config.align_param_gather and config.overlap_param_gather
    assert config.num_distributed_optimizer_instances == 2
    with on_a_gpu():
        built, _ = build_optimizer(run.optimizer, run.parallel, run.train, model)
    config = built.config
    assert config.use_precision_aware_optimizer and config.optimizer_cpu_offload
    assert config.overlap_cpu_optimizer_d2h_h2d and config.optimizer_offload_fraction == 0.5
    assert not config.store_param_remainders


def buckets_of(model: Any) -> list[Any]:
    return [bucket for group in model.bucket_groups for bucket in group.buckets]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp8", torch.uint8)],
)
def test_dtypes_arrive_at_megatron(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ext.training import optimizer as module

    given: dict[str, Any] = {}

    def note(**options: Any) -> Any:
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "MegatronOptimizerConfig", note)
    run = tiny_run()
    settings = replace(run.optimizer, exp_avg_dtype=name, exp_avg_sq_dtype=name, main_params_dtype="fp16")
    with pytest.raises(KeyboardInterrupt):
        build_optimizer(settings, run.parallel, run.train, torch.nn.Linear(1, 1))
    assert given["exp_avg_dtype"] == given["exp_avg_sq_dtype"] == dtype
    assert given["main_params_dtype"] == torch.float16
