"""Megatron's schedules around the model's loss: the micro-batches of a step or of an evaluation."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from lckv.config import CompressionConfig
from lckv.losses.linear_distillation import Lesson
from lckv.losses.token_losses import TokenLosses
from megatron_ext.config import TrainConfig
from megatron_ext.data.batch import Batch
from megatron_ext.model.policy_statistics import PolicyInputs, PolicyReport, row_seed
from megatron_ext.model.stages import StageCall
from megatron_ext.parallel.process_groups import device_of_rank
from megatron_ext.schedule.ring import Finished, run_ring
from megatron_ext.schedule.statistics_meter import StatisticsMeter
from megatron_ext.schedule.ticks import ticks_of

Taught = tuple[Batch, Lesson | None]
"""A micro-batch, and what a teacher makes of it; None: nothing, or this is not the last stage."""
Teach = Callable[[Iterator[Batch], int], Iterator[Taught]]
"""Adds to so many micro-batches what a teacher makes of them. All ranks call it together, before the schedule
that the micro-batches are for."""
Shapes = list[tuple[int, ...]]
Samples = Iterator[Mapping[str, Tensor]]
MakeBatch = Callable[[Mapping[str, Tensor]], Batch]


def micro_batches(train: TrainConfig) -> int:
    """Micro-batches per rank and step."""
    return train.global_batch_size // (train.micro_batch_size * parallel_state.get_data_parallel_world_size())


def stage_shapes(
    model: MegatronModule, seq_length: int, micro_batch_size: int
) -> Callable[[Shapes, Shapes], tuple[Shapes, Shapes]]:
    """Megatron's hook for the shapes of tensors between stages: those of the payloads with shared keys and
    values, for `seq_length` tokens of a row on this rank."""
    decoder = get_attr_wrapped_model(model, "decoder")
    payloads = decoder.payload_in(decoder.visit), decoder.payload_out(decoder.visit)
    shapes = ([payload.shape(seq_length, micro_batch_size)] for payload in payloads)
    received, sent = shapes
    return lambda _received, _sent: (received, sent)


@dataclass(frozen=True)
class _LossOfBatch:
    """What a stage does with the micro-batches of a step or an evaluation."""

    model: MegatronModule
    train: TrainConfig
    progress: float
    forward_only: bool

    def forward(
        self, taught: Taught, call: StageCall | None = None
    ) -> tuple[Tensor | TokenLosses, PolicyReport]:
        """See `OncePassage`."""
        batch, lesson = taught
        seeds = () if self.forward_only else tuple(row_seed(self.train.seed, n) for n in batch.sample_ids)
        policy = PolicyInputs(seeds, batch.counted, batch.chunk_rows, self.progress)
        output, report = self.model(
            batch.tokens,
            batch.position_ids,
            batch.labels,
            batch.documents(),
            policy=policy,
            call=call,
            loss_mask=batch.loss_mask,
            lesson=lesson,
        )
        return output, report

    def finish(self, taught: Taught, output: TokenLosses, report: PolicyReport) -> Finished:
        """See `OncePassage`."""
        return Finished(*token_loss(taught[0].loss_mask, report.auxiliary_loss, output))


def run_schedule(
    model: MegatronModule,
    samples: Samples,
    make_batch: MakeBatch,
    train: TrainConfig,
    meter: StatisticsMeter,
    *,
    progress: float,
    forward_only: bool,
    compression: CompressionConfig | None = None,
    teach: Teach | None = None,
) -> list[Tensor]:
    """Run the micro-batches of a step or an evaluation, with the map and the passes of `compression`; None:
    as configured, which is no family of maps. `teach`: of a teacher.

    Returns losses of this rank's micro-batches, float64 [3 + b] each: as `token_loss` reports them. Empty
    before the last stage."""
    passage = _LossOfBatch(model, train, progress, forward_only)
    decoder = get_attr_wrapped_model(model, "decoder")
    decoder.take(compression or decoder.config.compression)
    tokens = train.seq_length // decoder.context_group.chunks.ranks
    batches = map(make_batch, samples)
    taught: Iterator[Taught] = zip(batches, repeat(None))
    if teach is not None:
        taught = teach(batches, micro_batches(train))
    if decoder.journey.circulates:
        ticks = ticks_of(
            decoder.config.placed,
            decoder.journey,
            micro_batches(train),
            decoder.config.pipeline_in_flight,
            forward_only=forward_only,
        )
        shape = (tokens, train.micro_batch_size)
        return run_ring(model, taught, passage, meter.add, ticks, shape, forward_only=forward_only)

    def forward_step(
        iterator: Iterator[Taught], _stage: MegatronModule
    ) -> tuple[Tensor | TokenLosses, Callable[..., object]]:
        one = next(iterator)
        output, report = passage.forward(one)
        meter.add(report)
        return output, partial(token_loss, one[0].loss_mask, report.auxiliary_loss)

    options = {}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        options["adjust_tensor_shapes_fn"] = stage_shapes(model, tokens, train.micro_batch_size)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=taught,
        model=[model],
        num_microbatches=micro_batches(train),
        seq_length=train.seq_length,
        micro_batch_size=train.micro_batch_size,
        forward_only=forward_only,
        **options,
    )


def token_loss(
    loss_mask: Tensor, auxiliary: Tensor | None, output: TokenLosses
) -> tuple[Tensor, Tensor, Tensor]:
    """What is differentiated: the total of the tokens with `loss_mask` [b, s], each with its row's auxiliary
    loss [b] added; the number of tokens; and for reporting, float64 [3 + b], the sum of the cross-entropies
    alone, the number, the sum of what is made small, and the cross-entropies of the rows."""
    count = loss_mask.sum()
    counted = output.losses.float() * loss_mask
    objective = (output.objective.float() * loss_mask).sum()
    total = output.total
    reported = torch.cat((torch.stack((counted.sum(), count, objective)), counted.sum(1))).double()
    if auxiliary is not None:
        total = total + (auxiliary * loss_mask.sum(1)).sum()
    return total, count.to(torch.int), reported


class MeanLoss(NamedTuple):
    """Of all ranks' tokens, the same on every rank."""

    cross_entropy: float
    num_tokens: int
    objective: float
    """What is made small, the policy's loss apart: the cross-entropy with a z-loss, or with what is learned
    from a teacher."""


FIRST_ROW = 3
"""Place of the first row's loss in what `token_loss` reports."""


def mean_loss(losses: list[Tensor]) -> MeanLoss:
    """Means over all ranks' tokens and their number. Collective."""
    total = (
        torch.stack(losses)[:, :FIRST_ROW].sum(0)
        if losses
        else torch.zeros(FIRST_ROW, dtype=torch.float64, device=device_of_rank())
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
    cross_entropy, count, objective = total.tolist()
    return MeanLoss(cross_entropy / max(count, 1), int(count), objective / max(count, 1))
