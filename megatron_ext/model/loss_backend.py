"""Which backend of the loss a run's model.cross_entropy_backend means."""

from typing import Literal

import torch

from lckv.errors import UnsupportedError
from lckv.losses.backends import Choice, LossTerms, choose
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.precision import precision


def choose_loss(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision_name: Literal["fp32", "bf16"],
    *,
    device: torch.device | None = None,
) -> Choice:
    """For `train.precision` and a model on `device`; default: the GPU if there is one.
    Raises ConfigError where what is asked for cannot serve."""
    name = model.cross_entropy_backend
    try:
        return choose(
            name,
            device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=precision(precision_name).dtype,
            chunk_size=model.cross_entropy_chunk_size,
            terms=LossTerms(model.cross_entropy_z_loss),
            ranks=parallel.tensor_model_parallel_size,
        )
    except UnsupportedError as error:
        raise ConfigError(
            f"model.cross_entropy_backend is {name}, but {error.obstacle}. Set model.cross_entropy_backend "
            "to auto or chunked."
        ) from error
