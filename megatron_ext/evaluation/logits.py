"""Logits of given tokens, from a model on any layout."""

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.schedule.micro_batches import stage_shapes


@torch.no_grad()
def compute_logits(stage: SharedKVGPTModel, tokens: Tensor) -> Tensor | None:
    """Logits float32 [b, s, true vocabulary] of `tokens` int64 [b, s] on the ranks of the last pipeline
    stage, None on others.

    All ranks of a model call it with the same tokens; every row is one document at positions 0 .. s - 1.
    """
    rows, length = tokens.shape

    def forward_step(_iterator: object, model: SharedKVGPTModel) -> tuple[Tensor, Callable[..., Tensor]]:
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        output, _ = model(tokens, positions)
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
    if not outputs:
        return None
    return gather_from_tensor_model_parallel_region(outputs[0])[..., : stage.vocab_size].float()
