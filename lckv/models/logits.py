"""Which tokens get logits, and what of labels goes into the loss; the loss without logits.

Shapes: b rows, s tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lckv.losses.linear_cross_entropy import linear_cross_entropy


def kept_states(hidden_states: Tensor, logits_to_keep: int | Tensor, name: str = "logits_to_keep") -> Tensor:
    """The states of [b, s, hidden] whose logits are wanted: of the last so many tokens (0: all), of tokens
    at indices int64 [n], of each row's own ones int64 [b, n], or those marked in bool [b, s], then as [n,
    hidden]. `name`: what the caller calls the argument.

    Raises ValueError for what is none of these."""
    if not isinstance(logits_to_keep, Tensor):
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(
                f"{name} is {logits_to_keep!r}; it must be the number of tokens at the end, or 0 for all."
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


def check_targets(labels: Tensor, of_loss: Mapping[str, Any], states: Tensor) -> None:
    """Raises ValueError unless there is a label for each of `states` [..., hidden]."""
    for name, targets in (("labels", labels), ("shift_labels", of_loss.get("shift_labels"))):
        if targets is not None and targets.shape != states.shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(targets.shape)}; it must be {list(states.shape[:-1])}, one for each "
                "token that has logits (see logits_to_keep)."
            )


def check_skip_logits(skip_logits: bool, labels: Tensor | None, head: nn.Module, vocab_size: int) -> None:
    """Raises ValueError where logits are to be left out and there is no loss instead, or the head is more
    than its weight: an adapter's, quantised, or spread over devices."""
    if not skip_logits:
        return
    if labels is None:
        raise ValueError("skip_logits is true, and there are no labels: give labels, or leave it out.")
    weight = getattr(head, "weight", None)
    is_plain = type(head) is nn.Linear and type(weight) is nn.Parameter and head.bias is None
    if weight is None or not is_plain or len(weight) != vocab_size:
        raise ValueError(
            f"skip_logits is true, and lm_head is {type(head).__name__} with the weight "
            f"{type(weight).__name__}{list(getattr(weight, 'shape', ()))}: the loss needs a plain Linear of "
            f"{vocab_size} rows on this device. Leave skip_logits out."
        )


def loss_without_logits(
    states: Tensor,
    head: nn.Linear,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """transformers' loss of language models, float32 [], of states [..., hidden] and labels int64 [...]:
    cross-entropy of the shifted labels, summed, by `num_items_in_batch` or by the number of targets."""
    shifted = pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    targets = shifted.flatten()
    ignored = targets == ignore_index
    torch._assert_async(((targets >= 0) | ignored).all(), "a label is negative and not ignore_index")
    total = linear_cross_entropy(states.flatten(0, -2), head.weight, targets.masked_fill(ignored, -1)).total
    return total / ((~ignored).sum() if num_items_in_batch is None else num_items_in_batch)


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
