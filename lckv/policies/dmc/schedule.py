"""The three stages over time: how fast the decision channel fades, how much compression is asked for, and
what missing it costs."""

import torch
from torch import Tensor

FADE_END = 0.8
"""Share of stage zero_out after which the decision channel is 0."""


def fade(progress: float) -> float:
    """Factor of the last channel of queries and keys in stage zero_out, at a share `progress` of it."""
    return max(0.0, 1.0 - progress / FADE_END)


def compression_ratio(target: float, stage: str, progress: float) -> float:
    """Tokens per slot that are asked for at a share `progress` of the stage: from 1 to `target` in retrofit,
    `target` in finetune."""
    if stage == "retrofit":
        return 1.0 + (target - 1.0) * min(1.0, progress)
    return target if stage == "finetune" else 1.0


def hinge_loss(merge_rate: Tensor, ratio: float) -> Tensor:
    """max(0, 1 - 1/CR - m) of each merge rate m:
    what is missing to the share of merged tokens that `ratio` stands for."""
    return torch.relu(1.0 - 1.0 / ratio - merge_rate)


def ratio_of_rate(merge_rate: float) -> float:
    """Tokens per slot where a share `merge_rate` of tokens is merged."""
    return 1.0 / max(1.0 - merge_rate, 1e-9)
