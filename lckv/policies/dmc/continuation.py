"""Merging that goes on where it stopped: what of the newest slots later tokens need to know.

The state holds the newest tokens of each head's last slot, as many as a window W can reach back to (W - 1; at
least 1, and 1 for their mean where there is no window), newest last: key and value before RoPE, and weight.
Where a slot has fewer tokens the weight is 0.

Shapes: s new tokens, b rows, g KV heads, d channels, n tokens of the state;
a state is float32 [n, b, g, 2 d + 1].
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.policies.base import TokenContext
from lckv.policies.dmc.decisions import forced_openings
from lckv.policies.dmc.pooling import pool


class Turn:
    """Moves the padding in front of each row's tokens behind them,
    so that they follow the state's; and back again."""

    def __init__(self, counted: Tensor | None) -> None:
        """`counted` as in `TokenContext`."""
        self._first = None if counted is None or len(counted) == 1 else counted.int().argmax(0)

    def there(self, tensor: Tensor) -> Tensor:
        """Tokens first: [s, b, ...] to the same."""
        return tensor if self._first is None else self._turned(tensor, self._first)

    def back(self, tensor: Tensor) -> Tensor:
        """The inverse of `there`."""
        return tensor if self._first is None else self._turned(tensor, -self._first)

    @staticmethod
    def _turned(tensor: Tensor, first: Tensor) -> Tensor:
        index = (torch.arange(len(tensor), device=tensor.device)[:, None] + first) % len(tensor)
        return tensor[index, torch.arange(tensor.shape[1], device=tensor.device)]


def fresh_state(window: int | None, key: Tensor) -> Tensor:
    """The state before the first token, for keys [s, b, g, d]."""
    _, rows, heads, channels = key.shape
    tokens = 1 if window is None else max(1, window - 1)
    return torch.zeros(tokens, rows, heads, 2 * channels + 1, device=key.device)


def openings(logits: Tensor, state: Tensor, context: TokenContext, turn: Turn) -> Tensor:
    """bool [s, b, g], tokens first: which open a slot whatever their decision is, as
    `decisions.forced_openings`, but a row's first token only where there is no slot yet.
    `logits` are [s, b, g]."""
    opens = turn.there(forced_openings(logits, context))[..., None].repeat(1, 1, logits.shape[2])
    fresh = state[-1, ..., -1] == 0
    opens[0] = fresh if context.counted is None else fresh | ~context.counted.any(0)[:, None]
    return opens


def advance(
    state: Tensor,
    key: Tensor,
    value: Tensor,
    merge: Tensor,
    weight: Tensor,
    counted: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled keys and values [s, b, g, d] of the new tokens, and the state after them.

    `merge` (0 or 1) and `weight` are float32 [s, b, g]. `counted` (bool [s, b]; None: all) are tokens, ahead
    of all padding, which leaves no trace.
    """
    everything = torch.cat((state, torch.cat((key.float(), value.float(), weight[..., None]), -1)))
    merged = torch.cat((torch.ones_like(state[..., -1]), merge))  # what the state holds is one slot
    pooled = (
        _pool_one(everything, merge[0], window) if len(merge) == 1 else _pool_many(everything, merged, window)
    )
    pooled_key, pooled_value = (part[-len(merge) :].to(key.dtype) for part in pooled)
    after = _mean_after if window is None else _tokens_after
    return pooled_key, pooled_value, after(everything, merged, len(state), counted)


def _pool_one(everything: Tensor, merge: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """The mean of the last token and, where it is merged, of those before it that its window reaches."""
    reached = everything if window is None else everything[-window:]
    shares = reached[..., -1:].clone()
    shares[:-1] *= merge[..., None]
    pooled_key, pooled_value = ((reached[..., :-1] * shares).sum(0, keepdim=True) / shares.sum(0)).chunk(
        2, -1
    )
    return pooled_key, pooled_value


def _pool_many(everything: Tensor, merged: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Pooling over the state's tokens and the new ones."""
    channels = everything.shape[-1] // 2
    key, value, weight = everything.split((channels, channels, 1), -1)
    # Where the state has fewer tokens, theirs must not be 0 / 0.
    return pool(key, value, merged, weight[..., 0].clamp(min=torch.finfo(torch.float32).tiny), window)


def _tokens_after(everything: Tensor, merged: Tensor, tokens: int, counted: Tensor | None) -> Tensor:
    """The newest `tokens` tokens up to each row's last counted one,
    without weight where they are not in its slot."""
    device, (length, rows) = everything.device, everything.shape[:2]
    added = torch.full((rows,), length - tokens, device=device) if counted is None else counted.sum(0)
    index, row = torch.arange(tokens, device=device)[:, None] + added, torch.arange(rows, device=device)
    kept = everything[index, row]
    # A token is in the newest slot iff every later one was merged.
    later = merged[(index + 1).clamp(max=length - 1), row]
    later[-1] = 1
    kept[..., -1] *= later.flip(0).cumprod(0).flip(0)
    return kept


def _mean_after(everything: Tensor, merged: Tensor, tokens: int, counted: Tensor | None) -> Tensor:
    """The mean of the newest slot and its weight, as one token."""
    weight = everything[..., -1]
    if counted is not None:
        ignored = pad(~counted, (0, 0, tokens, 0))[..., None]
        weight, merged = weight.masked_fill(ignored, 0.0), merged.masked_fill(ignored, 1.0)
    later = torch.cat((merged[1:], torch.ones_like(merged[:1])))
    weight = (weight * later.flip(0).cumprod(0).flip(0))[..., None]
    total = weight.sum(0, keepdim=True)
    mean = (everything[..., :-1] * weight).sum(0, keepdim=True) / total.clamp(
        min=torch.finfo(torch.float32).tiny
    )
    return torch.cat((mean, total), -1)
