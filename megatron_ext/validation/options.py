"""What cannot work in the options of Megatron's data parallelism and optimizer: what each needs."""

from collections.abc import Iterator

from megatron_ext.config import OptimizerConfig, ParallelConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.validation.rules import at_least

_DTYPES = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def option_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Everything in these options that cannot work on `world_size` processes, one sentence each."""
    yield from _buckets(run.parallel)
    yield from _instances(run.parallel, world_size)
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


def _instances(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
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
            f"parallel.num_distributed_optimizer_instances is {count} and the data-parallel size is {copies}; "
            "the latter must be a multiple of the former."
        )


def _userbuffers(run: RunConfig) -> Iterator[str]:
    parallel = run.parallel
    if not parallel.tp_comm_overlap:
        return
    if not parallel.sequence_parallel:
        yield (
            "parallel.tp_comm_overlap is true and parallel.sequence_parallel is false; the former needs the "
            "latter: set it to true."
        )
    yield from _needs_transformer_engine("parallel.tp_comm_overlap is true", run)


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
    yield from _needs_distributed("optimizer.use_precision_aware_optimizer", run.parallel)
    yield from _needs_transformer_engine("optimizer.use_precision_aware_optimizer is true", run)


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
        yield from _needs_transformer_engine("optimizer.optimizer_cpu_offload is true", run)
    if sharding == "dp_reshardable":
        yield (
            "optimizer.optimizer_cpu_offload is true and checkpoint.optimizer_sharding is dp_reshardable; "
            "Megatron does not load that into the host's memory: set the latter to fully_reshardable."
        )


def _offload_is_off(optimizer: OptimizerConfig) -> Iterator[str]:
    given = [
        name
        for name, is_given in (
            ("optimizer_offload_fraction", 0 < optimizer.optimizer_offload_fraction < 1),
            ("overlap_cpu_optimizer_d2h_h2d", optimizer.overlap_cpu_optimizer_d2h_h2d),
        )
        if is_given
    ]
    for name in given:
        yield (
            f"optimizer.{name} is given and optimizer.optimizer_cpu_offload is false; set the latter to true, "
            "or leave the former out."
        )


def _needs_distributed(setting: str, parallel: ParallelConfig) -> Iterator[str]:
    if not parallel.use_distributed_optimizer:
        yield (
            f"{setting} is true and parallel.use_distributed_optimizer is false; the former needs the latter: "
            "set it to true."
        )


def _needs_transformer_engine(setting: str, run: RunConfig) -> Iterator[str]:
    """Its layers or its Adam, which need CUDA; torch is loaded to see."""
    from megatron_ext.model.implementation import choose_implementation

    if run.model.transformer_impl == "local":
        yield f"{setting}, which needs Transformer Engine, and model.transformer_impl is local; set it to auto."
        return
    try:
        choose_implementation("transformer_engine", run.train.precision)
    except ConfigError as error:
        reason = str(error).partition(", but ")[2].partition(". Set ")[0]
        yield f"{setting}, but {reason}. Leave the former at its default, or provide the latter."
