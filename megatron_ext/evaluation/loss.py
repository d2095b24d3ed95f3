"""The loss of a model on validation data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule

from lckv.config import CompressionConfig
from megatron_ext.config import TrainConfig
from megatron_ext.schedule.micro_batches import MakeBatch, Samples, mean_loss, run_schedule
from megatron_ext.schedule.statistics_meter import PolicyMeans, StatisticsMeter


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation tells."""

    loss: float
    """Mean cross-entropy, in nats; the same on every rank."""

    policy: PolicyMeans | None
    """What the KV policy did; None for one without statistics."""


@torch.no_grad()
def evaluate(
    model: MegatronModule,
    samples: Samples,
    make_batch: MakeBatch,
    train: TrainConfig,
    *,
    progress: float,
    stops: Callable[[], bool],
    compression: CompressionConfig | None = None,
) -> Evaluation | None:
    """The model's loss on train.eval_iters global batches, as it is at a share `progress` of its training,
    with the map of `compression`; None: as configured.

    Before each batch all ranks ask `stops`, which says the same to all; None where it says that the
    evaluation is to be left.
    """
    model.eval()
    total, count, meter, stopped = 0.0, 0, StatisticsMeter(model), False
    for _ in range(train.eval_iters):
        stopped = stops()
        if stopped:
            break
        losses = run_schedule(
            model,
            samples,
            make_batch,
            train,
            meter,
            progress=progress,
            forward_only=True,
            compression=compression,
        )
        loss, num_tokens, _ = mean_loss(losses)
        total, count = total + loss * num_tokens, count + num_tokens
    model.train()
    return None if stopped else Evaluation(total / max(count, 1), meter.total())
