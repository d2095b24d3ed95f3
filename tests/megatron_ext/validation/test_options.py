"""What validation says about options of Megatron's data parallelism, optimizer and overlap."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from megatron_ext.validation.run import problems
from tests.megatron_ext.validation.test_run import run_with

DISTRIBUTED = "parallel.use_distributed_optimizer"
AWARE = {"optimizer.use_precision_aware_optimizer": True}
OFFLOADED = {**AWARE, "optimizer.optimizer_cpu_offload": True}
INSTANCES = {"parallel.num_distributed_optimizer_instances": 2}


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has a GPU and Transformer Engine 2.11."""
    install(monkeypatch, "2.11.0", (9, 0))


def install(monkeypatch: pytest.MonkeyPatch, version: str, capability: tuple[int, int]) -> None:
    find_spec, version_of = importlib.util.find_spec, importlib.metadata.version

    def find(name: str) -> Any:
        return object() if name == "transformer_engine" else find_spec(name)

    def installed(name: str) -> str:
        return version if name == "transformer_engine" else version_of(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


CASES: list[tuple[Mapping[str, Any], str]] = [
    (
        {"parallel.ddp_bucket_size": 0, "parallel.overlap_grad_reduce": True},
        "parallel.ddp_bucket_size is 0; it must be at least 1.",
    ),
    (
        {"parallel.ddp_bucket_size": 5},
        "parallel.ddp_bucket_size is 5 and parallel.overlap_grad_reduce is false; without overlap there is",
    ),
    (
        {"parallel.ddp_pad_buckets_for_high_nccl_busbw": True, DISTRIBUTED: False},
        "parallel.ddp_pad_buckets_for_high_nccl_busbw is true and parallel.use_distributed_optimizer is",
    ),
    (
        {"parallel.align_param_gather": True},
        "parallel.align_param_gather is true and parallel.overlap_param_gather is false; the former",
    ),
    (
        {"parallel.num_distributed_optimizer_instances": 0},
        "parallel.num_distributed_optimizer_instances is 0; it must be at least 1.",
    ),
    (
        {**INSTANCES, DISTRIBUTED: False},
        "parallel.num_distributed_optimizer_instances is 2 and parallel.use_distributed_optimizer is false",
    ),
    (
        {"parallel.num_distributed_optimizer_instances": 3},
        (
            "parallel.num_distributed_optimizer_instances is 3 and the data-parallel size (times "
            "parallel.context_parallel_size) is 4; the latter must"
        ),
    ),
    (
        {**INSTANCES, "checkpoint.optimizer_sharding": "dp_reshardable"},
        "is 2 and checkpoint.optimizer_sharding is dp_reshardable, which Megatron cannot load",
    ),
    (
        {"optimizer.exp_avg_dtype": "bf16"},
        "optimizer.exp_avg_dtype is bf16 and optimizer.use_precision_aware_optimizer is false; set",
    ),
    (
        {**AWARE, DISTRIBUTED: False},
        "optimizer.use_precision_aware_optimizer is true and parallel.use_distributed_optimizer is false",
    ),
    (
        {**AWARE, "train.precision": "fp32"},
        "optimizer.use_precision_aware_optimizer is true and train.precision is fp32, which has no main",
    ),
    (
        {"optimizer.optimizer_cpu_offload": True},
        "optimizer_cpu_offload is true and optimizer.use_precision_aware_optimizer is false; the",
    ),
    (
        {**OFFLOADED, "optimizer.exp_avg_sq_dtype": "fp8"},
        "optimizer.exp_avg_sq_dtype is fp8 and optimizer.optimizer_cpu_offload is true; the host keeps",
    ),
    (
        {**OFFLOADED, "checkpoint.optimizer_sharding": "dp_reshardable"},
        "optimizer.optimizer_cpu_offload is true and checkpoint.optimizer_sharding is dp_reshardable",
    ),
    (
        {**OFFLOADED, "optimizer.optimizer_offload_fraction": 1.5},
        "optimizer.optimizer_offload_fraction is 1.5; it must be greater than 0 and at most 1.",
    ),
    (
        {"optimizer.optimizer_offload_fraction": 0.5},
        "optimizer.optimizer_offload_fraction is given and optimizer.optimizer_cpu_offload is false; set",
    ),
    (
        {"optimizer.overlap_cpu_optimizer_d2h_h2d": True},
        "optimizer.overlap_cpu_optimizer_d2h_h2d is given and optimizer.optimizer_cpu_offload is false; set",
    ),
]

OVERLAP = {
    "parallel.tensor_model_parallel_size": 2,
    "parallel.sequence_parallel": True,
    "parallel.tp_comm_overlap": True,
}
CASES += [
    (
        {**OVERLAP, "parallel.sequence_parallel": False},
        "parallel.tp_comm_overlap is true and parallel.sequence_parallel is false; the former needs",
    ),
    (
        {**OVERLAP, "model.transformer_impl": "local"},
        "parallel.tp_comm_overlap is true and model.transformer_impl is local; the former needs Transformer",
    ),
    (
        {**OVERLAP, "train.precision": "fp32"},
        "parallel.tp_comm_overlap is true and train.precision is fp32, for which Transformer Engine's",
    ),
    (
        {**OVERLAP, "parallel.tp_comm_overlap_cfg": "nowhere.yaml"},
        "parallel.tp_comm_overlap_cfg is nowhere.yaml, which cannot be read: [Errno 2] No such file",
    ),
    (
        {**OVERLAP, "parallel.tp_comm_overlap_cfg": __file__},
        "which cannot be read: ",
    ),
    (
        {"parallel.tp_comm_overlap_ag": False},
        "parallel.tp_comm_overlap_ag is false and parallel.tp_comm_overlap is false; set the latter to true",
    ),
    (
        {"parallel.tp_comm_bootstrap_backend": "mpi"},
        "parallel.tp_comm_bootstrap_backend is mpi and parallel.tp_comm_overlap is false; set the latter",
    ),
]


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(("changes", "message"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_one_problem_is_told_and_nothing_else(changes: Mapping[str, Any], message: str) -> None:
    (told,) = problems(run_with(dict(changes)), 4)
    assert message in told


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(
    "changes",
    [
        {**INSTANCES, "parallel.ddp_pad_buckets_for_high_nccl_busbw": True},
        {**AWARE, "optimizer.exp_avg_dtype": "bf16", "optimizer.main_params_dtype": "fp16"},
        {**OFFLOADED, "optimizer.optimizer_offload_fraction": 0.5},
        {**OVERLAP, "parallel.tp_comm_overlap_rs": False},
    ],
)
def test_what_works_is_let_through(changes: dict[str, Any]) -> None:
    assert problems(run_with(changes), 4) == []


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (AWARE, "optimizer.use_precision_aware_optimizer"),
        (OFFLOADED, "optimizer.use_precision_aware_optimizer"),
        (OVERLAP, "parallel.tp_comm_overlap"),
    ],
)
def test_what_needs_transformer_engine_is_refused_without(changes: dict[str, Any], setting: str) -> None:
    (told,) = problems(run_with(changes), 2)
    assert told.startswith(f"{setting} is true, but Transformer Engine needs CUDA")
    assert told.endswith("Leave the setting at its default, or provide what is missing.")


def test_an_old_transformer_engine_has_no_moments_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.2.0", (9, 0))
    (told,) = problems(run_with({**AWARE, "optimizer.exp_avg_dtype": "bf16"}), 1)
    assert told.startswith(
        "optimizer.exp_avg_dtype is bf16, which needs Transformer Engine 2.3, and 2.2.0 is"
    )


def test_several_instances_need_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "einops" else find_spec(name)
    )
    (told,) = problems(run_with(INSTANCES), 4)
    assert "instances is 2, but the package einops is not installed" in told
    assert "pip install einops, or set the former to 1" in told
