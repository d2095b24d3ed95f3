"""One optimizer step."""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from lckv.config import CompressionConfig
from megatron_ext.config import TrainConfig
from megatron_ext.schedule.micro_batches import (
    FIRST_ROW,
    MakeBatch,
    Samples,
    Teach,
    mean_loss,
    run_schedule,
)
from megatron_ext.schedule.statistics_meter import PolicyMeans, StatisticsMeter


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    lm_loss: float
    """Mean cross-entropy over the tokens of the global batch, in nats; the same on every rank."""

    objective: float
    """Mean over the same tokens of what the step made smaller, the policy's loss apart."""

    num_tokens: int
    """Tokens that the losses are the mean of."""

    grad_norm: float
    """Global gradient norm before clipping."""

    learning_rate: float
    """That the step used."""

    odd_samples: tuple[tuple[int, int], ...]
    """Rank, and number in the dataset, of the samples whose own loss was not finite, by number."""

    policy: PolicyMeans | None
    """What the KV policy did; None for one without statistics."""

    layer_types: str | None = None
    """The map, where it was drawn from a family."""


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
    compression: CompressionConfig | None = None,
    teach: Teach | None = None,
) -> StepResult:
    """Forward and backward of the global batch's micro-batches on this rank, gradient reduction, and the
    update.

    `progress` is the share of the run that is done before this step, 0 .. 1; `compression` has the map and
    the passes of this step, None: as configured. `teach`: of a teacher that is learned from.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    meter = StatisticsMeter(model)
    numbers: list[Tensor] = []
    read = _noting_numbers(samples, numbers)
    if model.ddp_config.align_param_gather:
        model.start_param_sync()
    losses = run_schedule(
        model,
        read,
        make_batch,
        train,
        meter,
        progress=progress,
        forward_only=False,
        compression=compression,
        teach=teach,
    )
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    loss, num_tokens, objective = mean_loss(losses)
    odd = () if math.isfinite(loss) else _odd_samples(losses, numbers)
    norm = float(grad_norm or 0.0)
    decoder = get_attr_wrapped_model(model, "decoder")
    drawn = None if decoder.has_one_map else str(decoder.layer_types)
    return StepResult(loss, objective, num_tokens, norm, float(learning_rate), odd, meter.total(), drawn)


def require_finite(
    result: StepResult, iteration: int, train: TrainConfig, origin: Callable[[int], object]
) -> None:
    """Raise NonFiniteLossError where the loss or the gradient norm of a step is not finite,
    NonFiniteStatisticError where a statistic of the KV policy is not, if train.check_for_nan_in_loss.

    `origin` says where the sample of a number begins.
    """
    if not train.check_for_nan_in_loss:
        return
    samples = _describe_samples(result, train, origin)
    if result.policy is not None:
        result.policy.require_finite(iteration, samples)
    if not all(map(math.isfinite, (result.lm_loss, result.objective, result.grad_norm))):
        teacher = ""
        if train.distillation.teacher is not None and math.isfinite(result.lm_loss):
            teacher = (
                f" The loss with what is learned from the teacher is {result.objective}: where that alone is "
                f"not finite, look at train.distillation.teacher, {train.distillation.teacher}."
            )
        raise NonFiniteLossError(
            f"iteration {iteration}: the loss is {result.lm_loss} and the gradient norm {result.grad_norm} "
            f"({samples}).{teacher} Nothing was saved after the last checkpoint. Resume from it with a lower "
            "optimizer.lr or other data, or set train.check_for_nan_in_loss to false to go on regardless."
        )


def _describe_samples(result: StepResult, train: TrainConfig, origin: Callable[[int], object]) -> str:
    if not result.odd_samples:
        return "ranks with such a loss: none, the loss of every sample is finite"
    ranks = ", ".join(map(str, sorted({rank for rank, _ in result.odd_samples})))
    numbers = sorted({number for _, number in result.odd_samples})
    return (
        f"ranks with such a loss: {ranks}; {len(numbers)} of {train.global_batch_size} samples, the first of "
        f"them number {numbers[0]}, which begins in {origin(numbers[0])}"
    )


def _noting_numbers(samples: Samples, numbers: list[Tensor]) -> Generator[Mapping[str, Tensor]]:
    """The same micro-batches; the numbers of the samples of each are appended to `numbers`."""
    for micro_batch in samples:
        numbers.append(micro_batch["sample_ids"])
        yield micro_batch


def _odd_samples(losses: list[Tensor], numbers: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """Rank and number of the samples that have losses that are not finite. Collective over all ranks.

    losses: as `token_loss` reports them of each micro-batch; numbers: [b] of each.
    """
    mine = [
        (dist.get_rank(), number)
        for loss, of_rows in zip(losses, numbers, strict=False)  # before the last stage there is no loss
        for number, is_finite in zip(of_rows.tolist(), loss[FIRST_ROW:].isfinite().tolist(), strict=True)
        if not is_finite
    ]
    of_ranks: list[list[tuple[int, int]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return tuple(sorted((odd for of_rank in of_ranks for odd in of_rank), key=lambda odd: odd[1]))
