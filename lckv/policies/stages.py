"""Stages of policies that learn to decide, over time: how fast a channel that decisions borrow fades, how
much compression is asked for, and what missing it costs.

Stage zero_out frees the channel, retrofit raises the target, finetune keeps it."""

import torch
from torch import Tensor

FADE_END = 0.8
"""Share of stage zero_out after which the borrowed channel is 0."""


def fade(progress: float) -> float:
    """Factor of the borrowed channel in stage zero_out, at a share `progress` of it."""
    return max(0.0, 1.0 - progress / FADE_END)


def compression_ratio(
    target: float, stage: str, progress: float, *, initial: float = 1.0, ramp: float = 1.0
) -> float:
    """Tokens per slot that are asked for at a share `progress` of the stage: in retrofit from `initial` to
    `target`, which is reached after a share `ramp` of the stage; in finetune `target`; else 1."""
    if stage == "retrofit":
        return initial + (target - initial) * min(1.0, progress / ramp)
    return target if stage == "finetune" else 1.0


def hinge_loss(rate: Tensor, ratio: float) -> Tensor:
    """max(0, 1 - 1/CR - m) of each share m of tokens that need no slot:
    what is missing to the share that `ratio` stands for."""
    return torch.relu(1.0 - 1.0 / ratio - rate)


def ratio_of_rate(rate: float) -> float:
    """Tokens per slot where a share `rate` of tokens needs none."""
    return 1.0 / max(1.0 - rate, 1e-9)
