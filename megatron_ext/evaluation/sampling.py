"""Sampling from a model as it is trained: no cache, the whole text runs for every token."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.evaluation.logits import compute_logits
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.parallel.process_groups import device_of_rank


def continue_tokens(
    stage: SharedKVGPTModel,
    prompt: list[int],
    *,
    new_tokens: int,
    context: int,
    temperature: float,
    top_k: int,
    eod: int,
    seed: int,
) -> list[int]:
    """Up to `new_tokens` token ids after `prompt`, until `eod`; at temperature 0 the likeliest.
    The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(new_tokens):
        window = torch.tensor([tokens[-context:]], device=device_of_rank())
        logits = compute_logits(stage, window)
        token = _agree(
            None if logits is None else _choose(logits[0, -1].cpu(), temperature, top_k, generator)
        )
        if token == eod:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    best = logits.topk(min(top_k or len(logits), len(logits)))
    drawn = torch.multinomial((best.values / temperature).softmax(0), 1, generator=generator)
    return int(best.indices[drawn])


def _agree(token: int | None) -> int:
    """What the last pipeline stage chose, on every stage."""
    chosen = torch.tensor([-1 if token is None else token], device=device_of_rank())
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(chosen, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return int(chosen)
