"""How many passes without gradient each step of a run has."""

from lckv.config import CompressionConfig
from lckv.sharing.pass_schedule import forward_passes_at
from megatron_ext.config import TrainConfig


def passes_of_step(compression: CompressionConfig, train: TrainConfig, iteration: int) -> int:
    """m of the step after `iteration` steps; the same on every rank, and in a run that goes on."""
    return forward_passes_at(
        train.forward_passes_schedule,
        train.least_forward_passes,
        compression.forward_passes,
        iteration=iteration,
        iterations=train.train_iters,
        seed=train.seed,
    )
