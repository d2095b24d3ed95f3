"""Which tokens get logits, and what of labels goes into the loss.

Shapes: b rows, s tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def kept_states(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states of [b, s, hidden] whose logits are wanted: of the last so many tokens (0: all), of tokens
    at indices int64 [n], of each row's own ones int64 [b, n], or those marked in bool [b, s], then as [n,
    hidden].

    Raises ValueError for what is none of these."""
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(
                f"logits_to_keep is {logits_to_keep}; it must be the number of tokens at the "
                "end, or 0 for all."
            )
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    shape = tuple(logits_to_keep.shape)
    if logits_to_keep.dtype == torch.bool and shape == tuple(hidden_states.shape[:2]):
        return hidden_states[logits_to_keep]
    if logits_to_keep.dtype != torch.bool and len(shape) == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype != torch.bool and len(shape) == 2 and shape[0] == hidden_states.shape[0]:
        rows = torch.arange(shape[0], device=hidden_states.device)[:, None]
        return hidden_states[rows, logits_to_keep]
    count, width = hidden_states.shape[:2]
    raise ValueError(
        f"logits_to_keep is a tensor {list(shape)} of {logits_to_keep.dtype}; for {count} rows of {width} "
        f"tokens it must be indices [n] or [{count}, n], or bool [{count}, {width}]."
    )


def check_labels(labels: Tensor | None, of_loss: Mapping[str, Any]) -> None:
    """Raises ValueError where arguments of the loss have no labels to go with."""
    if labels is not None:
        return
    for name in ("shift_labels", "ignore_index"):
        if name in of_loss:
            raise ValueError(
                f"{name} is given without labels, which it belongs to: give labels, or leave it out."
            )


def check_targets(labels: Tensor, of_loss: Mapping[str, Any], logits: Tensor) -> None:
    """Raises ValueError unless there is a label for each of `logits` [..., vocabulary]."""
    for name, targets in (("labels", labels), ("shift_labels", of_loss.get("shift_labels"))):
        if targets is not None and targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(targets.shape)}; it must be {list(logits.shape[:-1])}, one for each "
                "token that has logits (see logits_to_keep)."
            )


def share_of_batch(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor | float:
    """Share of this micro-batch in its batch: transformers' `Trainer` adds up the losses of micro-batches,
    and `num_items_in_batch` is the number of targets in all of them. 1 where it is not given."""
    if num_items_in_batch is None:
        return 1.0
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    return (targets != ignore_index).sum() / num_items_in_batch
