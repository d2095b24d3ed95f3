"""One optimizer step."""

import math
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ext.config import TrainConfig
from megatron_ext.schedule.micro_batches import MakeBatch, Samples, mean_loss, run_schedule
from megatron_ext.schedule.statistics_meter import PolicyMeans, StatisticsMeter


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    lm_loss: float
    """Mean cross-entropy over the tokens of the global batch, in nats; the same on every rank."""

    num_tokens: int
    """Tokens that the loss is the mean of."""

    grad_norm: float
    """Global gradient norm before clipping."""

    learning_rate: float
    """That the step used."""

    odd_ranks: tuple[int, ...]
    """Ranks whose own loss was not finite."""

    policy: PolicyMeans | None
    """What the KV policy did; None for one without statistics."""


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is not a number, or infinite."""


def train_step(
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    samples: Samples,
    make_batch: MakeBatch,
    train: TrainConfig,
    *,
    progress: float,
) -> StepResult:
    """Forward and backward of the global batch's micro-batches on this rank, gradient reduction, and the
    update.

    `progress` is the share of the run that is done before this step, 0 .. 1.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    meter = StatisticsMeter(model)
    losses = run_schedule(model, samples, make_batch, train, meter, progress=progress, forward_only=False)
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    loss, num_tokens = mean_loss(losses)
    odd_ranks = () if math.isfinite(loss) else _ranks_of_odd_losses(losses)
    return StepResult(
        loss, num_tokens, float(grad_norm or 0.0), float(learning_rate), odd_ranks, meter.total()
    )


def require_finite(result: StepResult, iteration: int, train: TrainConfig) -> None:
    """Raise NonFiniteLossError where the loss or the gradient norm of a step is not finite,
    NonFiniteStatisticError where a statistic of the KV policy is not, if train.check_for_nan_in_loss."""
    if train.check_for_nan_in_loss and result.policy is not None:
        result.policy.require_finite(iteration)
    if train.check_for_nan_in_loss and not (
        math.isfinite(result.lm_loss) and math.isfinite(result.grad_norm)
    ):
        ranks = ", ".join(map(str, result.odd_ranks)) or "none"
        raise NonFiniteLossError(
            f"iteration {iteration}: the loss is {result.lm_loss} and the gradient norm {result.grad_norm} "
            f"(ranks with such a loss: {ranks}). Nothing was saved after the last checkpoint. Resume from it "
            "with a lower optimizer.lr or other data, or set train.check_for_nan_in_loss to false to go on "
            "regardless."
        )


def _ranks_of_odd_losses(losses: list[Tensor]) -> tuple[int, ...]:
    """Ranks whose micro-batches have losses that are not finite. Collective over all ranks."""
    odd = not all(bool(loss.isfinite().all()) for loss in losses)
    of_ranks: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(of_ranks, odd)
    return tuple(rank for rank, is_odd in enumerate(of_ranks) if is_odd)
