"""From Hugging Face's masks and positions to what attention and KV policies need to know of the tokens.

Shapes: b rows, s tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.visibility import Documents


def counted_tokens(attention_mask: Tensor | None, tokens: int, older: int) -> Tensor | None:
    """bool [b, s]: which of the newest `tokens` tokens are not padding; None: all are not.

    `attention_mask` is [b, older + s] of 0 and 1, with `older` columns for what a cache holds. Raises
    ValueError for a mask of another shape and for padding between new tokens,
    which causal attention has no meaning for.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != older + tokens:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, {older + tokens}], "
            f"with 1 for tokens and 0 for padding, for {older} earlier columns and {tokens} new ones. Which "
            "key a query sees follows from the sharing map."
        )
    mask = attention_mask[:, older:].bool()
    if bool(mask.all()):
        return None
    begins = _begins(mask).sum(1)
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has padding between its tokens; padding goes before or after them."
        )
    return mask


def documents_of(counted: Tensor | None, position_ids: Tensor | None) -> Documents | None:
    """Rows split where padding ends and where positions start again from 0 (packed sequences); None: rows are
    whole.

    Both are [b, s]; None: no padding, no restarts.
    """
    if counted is None and position_ids is None:
        return None
    if counted is None:
        assert position_ids is not None
        starts = position_ids == 0
    else:
        starts = _begins(counted)
        if position_ids is not None:
            starts |= counted & (position_ids == 0)
    starts[:, 0] = True
    begins = starts.flatten().nonzero().squeeze(1)
    if len(begins) == len(starts):
        return None
    end = torch.tensor([starts.numel()], device=begins.device)
    return Documents(torch.cat((begins, end)).to(torch.int32))


def _begins(counted: Tensor) -> Tensor:
    """bool [b, s]: tokens behind padding, or at the start of the row."""
    return counted & ~pad(counted[:, :-1], (1, 0))


def positions(
    counted: Tensor | None, seen: Tensor | None, rows: int, tokens: int, device: torch.device
) -> Tensor:
    """int64 [b, s]: positions of new tokens behind `seen` [b] older ones; of padding, something in range."""
    every = torch.ones(rows, tokens, dtype=torch.bool, device=device) if counted is None else counted
    new = (every.cumsum(1) - 1).clamp(min=0)
    return new if seen is None else new + seen[:, None]
