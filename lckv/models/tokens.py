"""From Hugging Face's masks and positions to what attention and KV policies need to know of the tokens.

Shapes: b rows, s tokens.
"""

import torch
from torch import Tensor

from lckv.attention.visibility import Documents


def counted_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """bool [b, s]: which of the newest `tokens` tokens are not padding; None: all are not.

    `attention_mask` is [b, at least s] of 0 and 1. Raises ValueError for a mask of another shape and for padding between tokens,
    which causal attention has no meaning for.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, tokens] with 1 for tokens and 0 for padding, at "
            f"least {tokens} long. Which key a query sees follows from the sharing map."
        )
    mask = attention_mask[:, -tokens:].bool()
    if bool(mask.all()):
        return None
    whole = attention_mask.bool()
    begins = (whole[:, 1:] & ~whole[:, :-1]).sum(1) + whole[:, 0]
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has padding between its tokens; padding goes before or after them.")
    return mask


def documents_of(counted: Tensor | None, position_ids: Tensor | None) -> Documents | None:
    """Rows split where padding ends and where positions start again from 0 (packed sequences); None: rows are whole.

    Both are [b, s]; positions are only looked at where nothing is padding.
    """
    if counted is not None:
        starts = counted & ~torch.nn.functional.pad(counted[:, :-1], (1, 0))
    elif position_ids is not None:
        starts = position_ids == 0
    else:
        return None
    starts = starts.clone()
    starts[:, 0] = True
    if int(starts.sum()) == len(starts):
        return None
    begins = starts.flatten().nonzero().squeeze(1)
    end = torch.tensor([starts.numel()], device=begins.device)
    return Documents(torch.cat((begins, end)).to(torch.int32))


def positions(counted: Tensor | None, seen: Tensor | None, rows: int, tokens: int, device: torch.device) -> Tensor:
    """int64 [b, s]: positions of new tokens behind `seen` [b] older ones; of padding, something in range."""
    if counted is None:
        new = torch.arange(tokens, device=device).expand(rows, tokens)
    else:
        new = (counted.cumsum(1) - 1).clamp(min=0)
    return new if seen is None else new + seen[:, None]
