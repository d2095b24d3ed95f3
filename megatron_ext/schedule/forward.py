"""Micro-batches through all pipeline stages, without gradient: what the last stage makes of them."""

from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_ext.data.batch import Batch
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.policy_statistics import PolicyReport
from megatron_ext.schedule.micro_batches import stage_shapes
from megatron_ext.schedule.ring import OncePassage, run_ring
from megatron_ext.schedule.ticks import ticks_of


def _ignored(_report: PolicyReport) -> None:
    pass


@torch.no_grad()
def run_forward(
    stage: SharedKVGPTModel,
    batches: Iterator[Batch],
    passage: OncePassage[Batch],
    *,
    number: int,
    shape: tuple[int, int],
) -> list[Tensor]:
    """What `passage` collects of `number` micro-batches, whose tokens have `shape` (s, b) on this rank, in
    their order; nothing before the last stage. All ranks of a model call it together."""
    length, rows = shape
    if stage.decoder.journey.circulates:
        config = stage.config
        ticks = ticks_of(
            config.placed, stage.decoder.journey, number, config.pipeline_in_flight, forward_only=True
        )
        return run_ring(stage, batches, passage, _ignored, ticks, shape, forward_only=True)

    def forward_step(iterator: Iterator[Batch], _stage: object) -> tuple[object, Callable[..., Tensor]]:
        batch = next(iterator)
        output, report = passage.forward(batch)
        return output, lambda output, non_loss_data: passage.finish(batch, output, report).collected

    options = {}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        options["adjust_tensor_shapes_fn"] = stage_shapes(stage, length, rows)
    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[stage],
        num_microbatches=number,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
        **options,
    )
    return outputs
