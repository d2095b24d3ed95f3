"""Start and end of the process groups: torch.distributed from torchrun's environment,
and Megatron's groups on top."""

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_ext import cpu
from megatron_ext.config import ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.launch import world_size

logger = logging.getLogger(__name__)


def device_of_rank() -> torch.device:
    """This process's CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Start torch.distributed, if it is not running yet, and Megatron's process groups and random states.

    NCCL with CUDA, else gloo. Without torchrun the run is a single process. A collective that waits longer
    than `parallel.distributed_timeout_minutes` fails. Weights do not depend on the random states set here
    (see `model/initialization.py`); dropout does.
    """
    cpu.install()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        _start_torch_distributed(timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes)),
    )
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


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
    if "RANK" in os.environ:
        _join(backend, timeout)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)


def _join(backend: str, timeout: timedelta) -> None:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:
        raise ConfigError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not meet the others at {address} "
            f"(MASTER_ADDR and MASTER_PORT) within {timeout.total_seconds() / 60:g} minutes "
            f"(parallel.distributed_timeout_minutes): {str(error).splitlines()[0]} Start as many processes "
            "as WORLD_SIZE says, and choose a port that is free and can be reached."
        ) from error


def destroy() -> None:
    """End Megatron's process groups and torch.distributed."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
