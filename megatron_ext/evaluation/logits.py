"""Logits and losses of given tokens, from a model on any layout."""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn.functional import pad

from lckv.losses.token_losses import TokenLosses
from megatron_ext.data.batch import Batch
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.policy_statistics import PolicyInputs, PolicyReport
from megatron_ext.model.stages import StageCall
from megatron_ext.schedule.forward import run_forward
from megatron_ext.schedule.ring import Finished


@dataclass(frozen=True)
class _Reading:
    """What a stage does with tokens."""

    stage: SharedKVGPTModel
    losses: bool
    """Whether they have labels, whose losses are wanted; else logits are."""

    def forward(
        self, batch: Batch, call: StageCall | None = None
    ) -> tuple[Tensor | TokenLosses, PolicyReport]:
        """See `OncePassage`."""
        policy = PolicyInputs(chunk_rows=batch.chunk_rows)
        labels = batch.labels if self.losses else None
        output, report = self.stage(batch.tokens, batch.position_ids, labels, policy=policy, call=call)
        return output, report

    def finish(self, batch: Batch, output: Tensor | TokenLosses, _report: PolicyReport) -> Finished:
        """See `Passage`."""
        tensor = output.losses if isinstance(output, TokenLosses) else output
        return Finished(tensor, torch.zeros([], dtype=torch.int, device=tensor.device), tensor)


@torch.no_grad()
def compute_logits(stage: SharedKVGPTModel, tokens: Tensor) -> Tensor | None:
    """Logits float32 [b, s, true vocabulary] of `tokens` int64 [b, s] on the ranks of the last pipeline
    stage, None on others.

    All ranks of a model call it with the same tokens; every row is one document at positions 0 .. s - 1.
    """
    outputs = _outputs(_Reading(stage, losses=False), _batch(stage, tokens, tokens))
    if not outputs:
        return None
    own = gather_from_tensor_model_parallel_region(outputs[0])[..., : stage.vocab_size].float()
    return _whole(stage, own, tokens.shape[1])


@torch.no_grad()
def compute_losses(stage: SharedKVGPTModel, tokens: Tensor, labels: Tensor) -> Tensor | None:
    """Cross-entropies float32 [b, s], in nats, of `labels` int64 [b, s] behind `tokens` int64 [b, s], without
    their logits in memory. Where and how: see `compute_logits`."""
    outputs = _outputs(_Reading(stage, losses=True), _batch(stage, tokens, labels))
    return _whole(stage, outputs[0], tokens.shape[1]) if outputs else None


def _outputs(passage: _Reading, batch: Batch) -> list[Tensor]:
    """What the last stage has of a batch; nothing on others."""
    rows, length = batch.tokens.shape
    return run_forward(passage.stage, iter([batch]), passage, number=1, shape=(length, rows))


def _batch(stage: SharedKVGPTModel, tokens: Tensor, labels: Tensor) -> Batch:
    """What this rank has of rows [b, s], which context parallelism makes longer, so that they can be cut."""
    chunks, reach = stage.decoder.context_group.chunks, stage.config.compression.policy.traits.reach
    longer = (0, -tokens.shape[1] % chunks.total)
    tokens, labels = pad(tokens, longer), pad(labels, longer)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    whole = Batch(tokens, labels, torch.zeros(tokens.shape, device=tokens.device), positions, None)
    return whole.of_rank(chunks, reach)


def _whole(stage: SharedKVGPTModel, own: Tensor, length: int) -> Tensor:
    """The ranks' parts [b, s / CP, ...] of `length` tokens put together."""
    return stage.decoder.context_group.whole(own.transpose(0, 1)).transpose(0, 1)[:, :length]
