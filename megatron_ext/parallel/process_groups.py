"""Start and end of the process groups: torch.distributed from torchrun's environment,
and Megatron's groups on top."""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ext import cpu
from megatron_ext.config import ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.launch import world_size
from megatron_ext.parallel.chunks import Chunks

logger = logging.getLogger(__name__)


def device_of_rank() -> torch.device:
    """This process's CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def chunks_of_rank() -> Chunks:
    """What this process has of each row."""
    return Chunks(
        parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    )


def seed_of_rank(seed: int) -> int:
    """`seed` for what this process draws for its layers and tokens."""
    stage, part = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )
    return seed + 100 * stage + 100_000 * part


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Start torch.distributed, if it is not running yet, and Megatron's process groups and random states.

    NCCL with CUDA, else gloo. Without torchrun the run is a single process. A collective that waits longer
    than `parallel.start_timeout_minutes` fails; see `end_start`. Weights do not depend on the random states
    set here (see `model/initialization.py`); dropout does.
    """
    cpu.install()
    minutes = _start_minutes(parallel)
    if not dist.is_initialized():
        _start_torch_distributed(timedelta(minutes=minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        distributed_timeout_minutes=max(1, round(minutes)),
    )
    own_seed = seed_of_rank(seed)
    torch.manual_seed(own_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(own_seed)


def end_start(parallel: ParallelConfig) -> None:
    """The start is over: from now on collectives may wait for `parallel.distributed_timeout_minutes`. All
    ranks call it together."""
    if _start_minutes(parallel) != parallel.distributed_timeout_minutes:
        parallel_state.update_pg_timeout(timedelta(minutes=parallel.distributed_timeout_minutes))


def _start_minutes(parallel: ParallelConfig) -> float:
    given = parallel.start_timeout_minutes
    return parallel.distributed_timeout_minutes if given is None else given


def _start_torch_distributed(timeout: timedelta) -> None:
    world_size(os.environ)
    device = device_of_rank()
    if device.type == "cuda":
        local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= devices:
            raise ConfigError(
                f"torchrun started a process with LOCAL_RANK {local_rank}, but this machine has {devices} "
                f"GPU(s); use --nproc-per-node {devices} at most."
            )
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"backend": backend, "timeout": timeout}
    if backend == "nccl":
        # Connections are made now, where a failure says whose, and no collective guesses the device.
        options["device_id"] = device
    if "RANK" in os.environ:
        _join(options)
    else:
        dist.init_process_group(rank=0, world_size=1, store=dist.HashStore(), **options)


def _join(options: dict[str, Any]) -> None:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(**options)
    except dist.DistError as error:
        raise ConfigError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not meet the others at {address} "
            f"(MASTER_ADDR and MASTER_PORT) within {options['timeout'].total_seconds() / 60:g} "
            f"minutes (parallel.start_timeout_minutes): {str(error).splitlines()[0]} Start as many processes "
            "as WORLD_SIZE says, and choose a port that is free and can be reached."
        ) from error


def destroy() -> None:
    """End Megatron's process groups and torch.distributed."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
