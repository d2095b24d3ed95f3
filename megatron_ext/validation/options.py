"""What cannot work in the options of Megatron's data parallelism and optimizer: what each needs."""

import importlib.util
from collections.abc import Iterator
from dataclasses import fields

from megatron_ext.config import CheckpointConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.userbuffers import read_overlap_settings
from megatron_ext.validation.rules import at_least
from megatron_ext.validation.transformer_engine import needs_layers, needs_transformer_engine, needs_version

_DTYPES = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def option_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Everything in these options that cannot work on `world_size` processes, one sentence each."""
    yield from _buckets(run.parallel)
    yield from _instances(run.parallel, run.checkpoint, world_size)
    yield from _userbuffers(run)
    yield from _precision_aware(run)
    yield from _offload(run)


def _buckets(parallel: ParallelConfig) -> Iterator[str]:
    yield from at_least("parallel", parallel, 1, "ddp_bucket_size")
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        yield (
            f"parallel.ddp_bucket_size is {parallel.ddp_bucket_size} and parallel.overlap_grad_reduce is "
            "false; without overlap there is one bucket: set the latter to true, or leave the former out."
        )
    if parallel.ddp_pad_buckets_for_high_nccl_busbw and not parallel.use_distributed_optimizer:
        yield (
            "parallel.ddp_pad_buckets_for_high_nccl_busbw is true and parallel.use_distributed_optimizer is "
            "false; only the distributed optimizer pads buckets: set the latter to true, or the former to "
            "false."
        )
    if parallel.align_param_gather and not parallel.overlap_param_gather:
        yield (
            "parallel.align_param_gather is true and parallel.overlap_param_gather is false; the former says "
            "when overlapped gathers start: set the latter to true, or the former to false."
        )


def _instances(parallel: ParallelConfig, checkpoint: CheckpointConfig, world_size: int) -> Iterator[str]:
    count = parallel.num_distributed_optimizer_instances
    yield from at_least("parallel", parallel, 1, "num_distributed_optimizer_instances")
    if count > 1 and not parallel.use_distributed_optimizer:
        yield (
            f"parallel.num_distributed_optimizer_instances is {count} and parallel.use_distributed_optimizer "
            "is false; set the latter to true, or the former to 1."
        )
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    copies = world_size // ranks if ranks > 0 and world_size % ranks == 0 else 0
    if count > 1 and copies and copies % count:
        yield (
            f"parallel.num_distributed_optimizer_instances is {count} and the data-parallel size (times "
            f"parallel.context_parallel_size) is {copies}; the latter must be a multiple of the former."
        )
    if count > 1 and checkpoint.optimizer_sharding == "dp_reshardable":
        yield (
            f"parallel.num_distributed_optimizer_instances is {count} and checkpoint.optimizer_sharding is "
            "dp_reshardable, which Megatron cannot load into several instances: set the latter to "
            "fully_reshardable."
        )
    if count > 1 and importlib.util.find_spec("einops") is None:
        yield (
            f"parallel.num_distributed_optimizer_instances is {count}, but the package einops is not "
            "installed, with which Megatron makes the groups; pip install einops, or set the former to 1."
        )


def _userbuffers(run: RunConfig) -> Iterator[str]:
    parallel = run.parallel
    if not parallel.tp_comm_overlap:
        yield from _overlap_is_off(parallel)
        return
    if not parallel.sequence_parallel:
        yield (
            "parallel.tp_comm_overlap is true and parallel.sequence_parallel is false; the former needs the "
            "latter: set it to true."
        )
    try:
        read_overlap_settings(parallel.tp_comm_overlap_cfg)
    except ConfigError as error:
        yield str(error)
    yield from needs_layers("parallel.tp_comm_overlap is true", run)


def _overlap_is_off(parallel: ParallelConfig) -> Iterator[str]:
    for entry in fields(parallel):
        value = getattr(parallel, entry.name)
        if entry.name.startswith("tp_comm_") and value != entry.default:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield (
                f"parallel.{entry.name} is {shown} and parallel.tp_comm_overlap is false; set the latter to "
                "true, or leave the former out."
            )


def _precision_aware(run: RunConfig) -> Iterator[str]:
    optimizer = run.optimizer
    if not optimizer.use_precision_aware_optimizer:
        for name in _DTYPES:
            if (dtype := getattr(optimizer, name)) != "fp32":
                yield (
                    f"optimizer.{name} is {dtype} and optimizer.use_precision_aware_optimizer is false; set "
                    "the latter to true, or the former to fp32."
                )
        return
    setting = "optimizer.use_precision_aware_optimizer is true"
    if not run.parallel.use_distributed_optimizer:
        yield f"{setting} and parallel.use_distributed_optimizer is false; set the latter to true."
    if run.train.precision == "fp32":
        yield (
            f"{setting} and train.precision is fp32, which has no main weights beside the model's: set the "
            "former to false."
        )
    yield from needs_transformer_engine(setting)
    for name in _DTYPES:
        if getattr(optimizer, name) == "bf16":
            yield from needs_version(f"optimizer.{name} is bf16", "2.3")


def _offload(run: RunConfig) -> Iterator[str]:
    optimizer, sharding = run.optimizer, run.checkpoint.optimizer_sharding
    if not 0 < optimizer.optimizer_offload_fraction <= 1:
        yield (
            f"optimizer.optimizer_offload_fraction is {optimizer.optimizer_offload_fraction}; it must be "
            "greater than 0 and at most 1."
        )
    if not optimizer.optimizer_cpu_offload:
        yield from _offload_is_off(optimizer)
        return
    if not optimizer.use_precision_aware_optimizer:
        yield (
            "optimizer.optimizer_cpu_offload is true and optimizer.use_precision_aware_optimizer is false; "
            "the former needs the latter: set it to true."
        )
    for name in _DTYPES:
        if (dtype := getattr(optimizer, name)) != "fp32" and optimizer.use_precision_aware_optimizer:
            yield (
                f"optimizer.{name} is {dtype} and optimizer.optimizer_cpu_offload is true; the host keeps "
                "everything in fp32: set the former to fp32, or the latter to false."
            )
    if sharding == "dp_reshardable":
        yield (
            "optimizer.optimizer_cpu_offload is true and checkpoint.optimizer_sharding is dp_reshardable; "
            "Megatron does not load that into the host's memory: set the latter to fully_reshardable."
        )


def _offload_is_off(optimizer: OptimizerConfig) -> Iterator[str]:
    given = {
        "optimizer_offload_fraction": 0 < optimizer.optimizer_offload_fraction < 1,
        "overlap_cpu_optimizer_d2h_h2d": optimizer.overlap_cpu_optimizer_d2h_h2d,
    }
    for name in (name for name, is_given in given.items() if is_given):
        yield (
            f"optimizer.{name} is given and optimizer.optimizer_cpu_offload is false; set the latter to "
            "true, or leave the former out."
        )
