"""One optimizer step, and one evaluation: Megatron's schedules around the model's loss."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.policies.dmc.decisions import check_finite
from megatron_ext.config import TrainConfig
from megatron_ext.data.batch import Batch
from megatron_ext.model.merging import PolicyInputs, row_seed
from megatron_ext.parallel.process_groups import device_of_rank
from megatron_ext.training.merging import MergeRateMeter, Merging

Shapes = list[tuple[int, ...]]
Samples = Iterator[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    loss: float
    """Mean cross-entropy, in nats; the same on every rank."""

    merging: Merging | None
    """What a policy that merges tokens did; None for others."""


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

    merging: Merging | None
    """What a policy that merges tokens did; None for others."""


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is not a number, or infinite."""


def train_step(
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    samples: Samples,
    make_batch: Callable[[Mapping[str, Tensor]], Batch],
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
    rates = MergeRateMeter(model)
    losses = run_schedule(model, samples, make_batch, train, rates, progress=progress, forward_only=False)
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    loss, num_tokens = mean_loss(losses)
    odd_ranks = () if math.isfinite(loss) else _ranks_of_odd_losses(losses)
    return StepResult(
        loss, num_tokens, float(grad_norm or 0.0), float(learning_rate), odd_ranks, rates.total()
    )


def require_finite(result: StepResult, iteration: int, train: TrainConfig) -> None:
    """Raise NonFiniteLossError where the loss or the gradient norm of a step is not finite,
    NonFiniteDecisionError where a merge decision is not, if train.check_for_nan_in_loss."""
    if train.check_for_nan_in_loss and result.merging is not None:
        check_finite(result.merging.rates[:, None], result.merging.layers, iteration)
    if train.check_for_nan_in_loss and not (
        math.isfinite(result.lm_loss) and math.isfinite(result.grad_norm)
    ):
        ranks = ", ".join(map(str, result.odd_ranks)) or "none"
        raise NonFiniteLossError(
            f"iteration {iteration}: the loss is {result.lm_loss} and the gradient norm {result.grad_norm} "
            "(ranks with such a loss: "
            f"{ranks}). Nothing was saved after the last checkpoint. Resume from it with a lower "
            "optimizer.lr or other data, or set "
            "train.check_for_nan_in_loss to false to go on regardless."
        )


@torch.no_grad()
def evaluate(
    model: MegatronModule,
    samples: Samples,
    make_batch: Callable[[Mapping[str, Tensor]], Batch],
    train: TrainConfig,
    *,
    progress: float,
) -> Evaluation:
    """The model's loss on train.eval_iters global batches, as it is at a share `progress` of its training."""
    model.eval()
    total, count, rates = 0.0, 0, MergeRateMeter(model)
    for _ in range(train.eval_iters):
        losses = run_schedule(model, samples, make_batch, train, rates, progress=progress, forward_only=True)
        loss, num_tokens = mean_loss(losses)
        total, count = total + loss * num_tokens, count + num_tokens
    model.train()
    return Evaluation(total / max(count, 1), rates.total())


def micro_batches(train: TrainConfig) -> int:
    """Micro-batches per rank and step."""
    return train.global_batch_size // (train.micro_batch_size * parallel_state.get_data_parallel_world_size())


def stage_shapes(
    model: MegatronModule, seq_length: int, micro_batch_size: int
) -> Callable[[Shapes, Shapes], tuple[Shapes, Shapes]]:
    """Megatron's hook for the shapes of tensors between stages: those of the payloads with shared keys and
    values."""
    decoder = get_attr_wrapped_model(model, "decoder")
    shapes = (
        [payload.shape(seq_length, micro_batch_size)] for payload in (decoder.payload_in, decoder.payload_out)
    )
    received, sent = shapes
    return lambda _received, _sent: (received, sent)


def run_schedule(
    model: MegatronModule,
    samples: Samples,
    make_batch: Callable[[Mapping[str, Tensor]], Batch],
    train: TrainConfig,
    rates: MergeRateMeter,
    *,
    progress: float,
    forward_only: bool,
) -> list[Tensor]:
    """Losses of this rank's micro-batches, float64 [2] each: sum and number of tokens. Empty before the last
    stage."""

    def forward_step(iterator: Samples, stage: MegatronModule) -> tuple[Tensor, Callable[..., object]]:
        batch = make_batch(next(iterator))
        documents = None if batch.cu_seqlens is None else Documents(batch.cu_seqlens)
        seeds = () if forward_only else tuple(row_seed(train.seed, sample) for sample in batch.sample_ids)
        policy = PolicyInputs(seeds, batch.counted, progress)
        output, report = stage(batch.tokens, batch.position_ids, batch.labels, documents, policy=policy)
        rates.add(report)
        return output, partial(token_loss, batch.loss_mask, report.auxiliary_loss)

    options = {}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        options["adjust_tensor_shapes_fn"] = stage_shapes(model, train.seq_length, train.micro_batch_size)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=samples,
        model=[model],
        num_microbatches=micro_batches(train),
        seq_length=train.seq_length,
        micro_batch_size=train.micro_batch_size,
        forward_only=forward_only,
        **options,
    )


def token_loss(loss_mask: Tensor, auxiliary: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is differentiated: the sum of the losses [b, s] of tokens with `loss_mask` [b, s], each with its
    row's auxiliary loss [b] added; the number of tokens; and for reporting, float64 [2], the sum without
    auxiliary loss and the number."""
    count = loss_mask.sum()
    total = (losses.float() * loss_mask).sum()
    reported = torch.stack((total.detach().double(), count.double()))
    if auxiliary is not None:
        total = total + (auxiliary * loss_mask.sum(1)).sum()
    return total, count.to(torch.int), reported


def _ranks_of_odd_losses(losses: list[Tensor]) -> tuple[int, ...]:
    """Ranks whose micro-batches have losses that are not finite. Collective over all ranks."""
    odd = not all(bool(loss.isfinite().all()) for loss in losses)
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, odd)
    return tuple(rank for rank, is_odd in enumerate(found) if is_odd)


def mean_loss(losses: list[Tensor]) -> tuple[float, int]:
    """Mean over all ranks' tokens and their number, on every rank."""
    total = (
        torch.stack(losses).sum(0) if losses else torch.zeros(2, dtype=torch.float64, device=device_of_rank())
    )
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total[0] / total[1].clamp(min=1)), int(total[1])
