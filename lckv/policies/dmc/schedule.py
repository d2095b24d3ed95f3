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
    """max(0, 1 - 1/CR - m) of each merge rate m: what is missing to the share of merged tokens that `ratio`
    stands for."""
    return torch.relu(1.0 - 1.0 / ratio - merge_rate)


def decision_rows(heads: int, head_dim: int) -> list[int]:
    """Rows of the decision channel in the weight of a projection to `heads` heads (a lone query or key
    projection)."""
    return list(range(head_dim - 1, heads * head_dim, head_dim))


def fused_decision_rows(query_heads: int, kv_heads: int, head_dim: int) -> list[int]:
    """Rows of the decision channel in Megatron's fused weight: per KV head its query heads, its key, its
    value. Those of queries and keys, to be zeroed at the end of stage zero_out, also in the bias if there is
    one; values have no decision channel."""
    per_group = query_heads // kv_heads + 2
    return [
        row
        for row in decision_rows(kv_heads * per_group, head_dim)
        if row // head_dim % per_group < per_group - 1
    ]
