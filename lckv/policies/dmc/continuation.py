"""Merging that goes on where it stopped: what of the newest slots later tokens need to know.

The state holds the newest tokens of each head's last slot, as many as a window W can reach back to (W - 1; at least 1, and 1 for
their mean where there is no window), newest last: key and value before RoPE, and weight. Where a slot has fewer tokens the weight is 0.

Shapes: s new tokens, b rows, g KV heads, d channels, n tokens of the state; a state is float32 [n, b, g, 2 d + 1].
"""

import torch
from torch import Tensor

from lckv.policies.base import TokenContext
from lckv.policies.dmc.decisions import forced_openings
from lckv.policies.dmc.pooling import pool


def fresh_state(window: int | None, key: Tensor) -> Tensor:
    """The state before the first token, for keys [s, b, g, d]."""
    _, rows, heads, channels = key.shape
    tokens = 1 if window is None else max(1, window - 1)
    return torch.zeros(tokens, rows, heads, 2 * channels + 1, device=key.device)


def openings(logits: Tensor, state: Tensor, context: TokenContext) -> Tensor:
    """bool [s, b, g]: new tokens that open a slot whatever their decision is, as `decisions.forced_openings`, but the first of a row
    only where there is no slot yet."""
    opens = forced_openings(logits, context)[..., None].repeat(1, 1, logits.shape[2])
    fresh = state[-1, ..., -1] == 0
    opens[0] = fresh if context.counted is None else fresh | ~context.counted[0, :, None]
    return opens


def advance(
    state: Tensor,
    key: Tensor,
    value: Tensor,
    merge: Tensor,
    weight: Tensor,
    counted: Tensor | None,
    window: int | None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Pooled keys and values [s, b, g, d] of the new tokens, and the state after them.

    `merge` (0 or 1) and `weight` are float32 [s, b, g]; `counted` as in `TokenContext`: what is not counted leaves no trace.
    """
    new = torch.cat((key.float(), value.float(), weight[..., None]), -1)
    if len(new) == 1:
        pooled = _pool_one(state, new[0], merge[0], window)
    else:
        pooled = _pool_many(state, key, value, merge, weight, window)
    pooled_key, pooled_value = (part.to(key.dtype) for part in pooled)
    return (pooled_key, pooled_value), _state_after(state, new, merge, counted, window)


def _pool_one(state: Tensor, new: Tensor, merge: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """The mean of one token and, where it is merged, of those of the state that its window reaches."""
    reached = state if window is None else state[len(state) - (window - 1) :]
    shares = torch.cat((reached[..., -1:] * merge[..., None], new[None, ..., -1:]))
    features = torch.cat((reached[..., :-1], new[None, ..., :-1]))
    mean = (features * shares).sum(0, keepdim=True) / shares.sum(0, keepdim=True)
    pooled_key, pooled_value = mean.chunk(2, -1)
    return pooled_key, pooled_value


def _pool_many(
    state: Tensor, key: Tensor, value: Tensor, merge: Tensor, weight: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Pooling over the state's tokens, all of them merged into one slot, and the new ones."""
    tokens, old_weight = len(state), state[..., -1]
    old_key, old_value = state[..., :-1].chunk(2, -1)
    # A missing token must not make 0 / 0 of its own mean, which nobody reads.
    old_weight = torch.where(old_weight == 0, torch.finfo(torch.float32).tiny, old_weight)
    pooled = pool(
        torch.cat((old_key.to(key.dtype), key)),
        torch.cat((old_value.to(value.dtype), value)),
        torch.cat((torch.ones_like(old_weight), merge)),
        torch.cat((old_weight, weight)),
        window,
    )
    return pooled[0][tokens:], pooled[1][tokens:]


def _state_after(state: Tensor, new: Tensor, merge: Tensor, counted: Tensor | None, window: int | None) -> Tensor:
    """The tokens of the slot that is the newest after each row's last counted token."""
    if window is None:
        return _mean_after(state, new, merge, counted)
    tokens, (length, rows) = len(state), new.shape[:2]
    everything = torch.cat((state, new))
    merged = torch.cat((torch.ones_like(state[..., 0]), merge))
    if counted is None:
        ends = torch.full((rows,), tokens + length - 1, device=new.device)
    else:
        position = torch.arange(length, device=new.device)[:, None]
        ends = tokens + torch.where(counted, position, -1).amax(0)
    newest = ends - torch.arange(tokens - 1, -1, -1, device=new.device)[:, None]
    index = newest[..., None].expand(-1, -1, merge.shape[2])
    kept = everything.gather(0, index[..., None].expand(-1, -1, -1, everything.shape[-1]))
    # A token is in the newest slot iff every later one was merged.
    later = merged.gather(0, (index + 1).clamp(max=len(merged) - 1))
    later[-1] = 1
    in_slot = later.flip(0).cumprod(0).flip(0)
    kept[..., -1] *= in_slot
    return kept


def _mean_after(state: Tensor, new: Tensor, merge: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of the newest slot and its weight."""
    weight = torch.cat((state[..., -1], new[..., -1]))
    merged = torch.cat((torch.ones_like(state[..., -1]), merge))
    if counted is not None:
        ignored = ~torch.cat((torch.ones_like(counted[:1]), counted))[..., None]
        weight, merged = weight.masked_fill(ignored, 0.0), merged.masked_fill(ignored, 1.0)
    later = torch.cat((merged[1:], torch.ones_like(merged[:1])))
    weight = (weight * later.flip(0).cumprod(0).flip(0))[..., None]
    total = weight.sum(0, keepdim=True)
    features = torch.cat((state[..., :-1], new[..., :-1]))
    mean = (features * weight).sum(0, keepdim=True) / total.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat((mean, total), -1)
