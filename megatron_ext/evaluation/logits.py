"""Logits of given tokens, from a model on any layout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.policy_statistics import PolicyReport
from megatron_ext.model.stages import StageCall
from megatron_ext.schedule.micro_batches import stage_shapes
from megatron_ext.schedule.ring import Finished, run_ring
from megatron_ext.schedule.ticks import ticks_of


@dataclass(frozen=True)
class _Logits:
    """What a stage does with tokens [b, s]."""

    stage: SharedKVGPTModel

    def forward(self, tokens: Tensor, call: StageCall | None = None) -> tuple[Tensor, PolicyReport]:
        """See `Passage`; without `call` the stage is visited once."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output, report = self.stage(tokens, positions, call=call)
        return output, report

    def finish(self, tokens: Tensor, output: Tensor, _report: PolicyReport) -> Finished:
        """See `Passage`."""
        return Finished(output, torch.zeros([], dtype=torch.int, device=tokens.device), output)


def _ignored(_report: PolicyReport) -> None:
    pass


@torch.no_grad()
def compute_logits(stage: SharedKVGPTModel, tokens: Tensor) -> Tensor | None:
    """Logits float32 [b, s, true vocabulary] of `tokens` int64 [b, s] on the ranks of the last pipeline
    stage, None on others.

    All ranks of a model call it with the same tokens; every row is one document at positions 0 .. s - 1.
    """
    rows, length = tokens.shape

    passage = _Logits(stage)
    if stage.decoder.journey.circulates:
        ticks = ticks_of(stage.config.placed, stage.decoder.journey, 1, 1, forward_only=True)
        shape = (length, rows)
        outputs = run_ring(stage, iter([tokens]), passage, _ignored, ticks, shape, forward_only=True)
        return _whole(stage, outputs)

    def forward_step(_iterator: object, _model: SharedKVGPTModel) -> tuple[Tensor, Callable[..., Tensor]]:
        output, _ = passage.forward(tokens)
        return output, lambda logits, non_loss_data: logits

    options = {}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        options["adjust_tensor_shapes_fn"] = stage_shapes(stage, length, rows)
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[stage],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
        **options,
    )
    return _whole(stage, outputs)


def _whole(stage: SharedKVGPTModel, outputs: list[Tensor]) -> Tensor | None:
    """The ranks' parts of the logits put together; None before the last stage."""
    if not outputs:
        return None
    return gather_from_tensor_model_parallel_region(outputs[0])[..., : stage.vocab_size].float()
