"""From decision logits to what attention and a cache need to know.

The decision of token t + 1 is about token t. The tokens of a row are those that count: padding decides
nothing, nothing is decided about it, and the token behind it decides about the one before it. A token that
begins a document decides about none.

    token        0     1     2     3     4     5
    decision           drop  keep  drop  drop  keep       of token 1 about token 0, ...
    dropped      0           2     3                      once W + 1 tokens are behind them

Shapes: s tokens, b rows, g KV heads. Everything is float32.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lckv.attention.key_bias import HIDDEN
from lckv.policies.base import TokenContext

_KEEP, _DROP = 1.0, 2.0
"""Decisions in a cache's state, where 0 stands for no token."""


def noisy_logits(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """z [s, b, g] of training, from x and noise [s, b, g] (none: 0)."""
    return (logits if noise is None else logits + noise) / temperature


def soft_bias(noisy: Tensor, context: TokenContext) -> Tensor:
    """[s, b, g]: log(1 - p) for the p = sigmoid(z) that is about the token, at least `HIDDEN`; 0 where there
    is none."""
    return about_the_token(logsigmoid(-noisy).clamp(min=HIDDEN), context)


def hard_bias(logits: Tensor, context: TokenContext) -> Tensor:
    """[s, b, g]: `HIDDEN` for tokens that are dropped, 0 for others."""
    if len(logits) == 1:  # nothing is decided yet about a token that none follows
        return torch.zeros_like(logits)
    return about_the_token((logits > 0).float() * HIDDEN, context)


def about_the_token(decisions: Tensor, context: TokenContext) -> Tensor:
    """What is about each token, from what each token decides [s, b, g]; 0 where nothing is."""
    tokens, rows, heads = decisions.shape
    decisions = decisions.masked_fill(context.begins(tokens, rows, decisions.device)[..., None], 0.0)
    none = torch.zeros_like(decisions[:1])
    if context.counted is None:
        return torch.cat((decisions[1:], none))
    # Where padding is, the next token that is none: [s, b], s where there is none.
    places = torch.arange(tokens, device=decisions.device)[:, None].expand(-1, rows)
    own = places.masked_fill(~context.counted, tokens)
    following = torch.cat((own[1:], torch.full_like(own[:1], tokens)))
    following = following.flip(0).cummin(0).values.flip(0)
    return torch.cat((decisions, none)).gather(0, following[..., None].expand(-1, -1, heads))


def without_borders(logits: Tensor, context: TokenContext) -> Tensor:
    """Decision logits [s, b, g] with which tokens that begin documents drop nothing. (Where there are no
    documents, the first token may follow those of a cache, and then decides about the newest one.)"""
    if context.documents is None:
        return logits
    tokens, rows, _ = logits.shape
    begins = context.begins(tokens, rows, logits.device)
    return logits.masked_fill(begins[..., None], -1.0)


def fresh_state(window: int, logits: Tensor) -> Tensor:
    """The state [W, b, g, 1] before the first token."""
    return torch.zeros(window, *logits.shape[1:], 1, device=logits.device)


def advance(state: Tensor, logits: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which of the newest W + 1 slots of a cache are hidden, bool [W + 1, b, g], and the state afterwards.

    The state holds the decisions of the newest W tokens, the newest last; with the first new one these are
    the decisions about the newest W + 1. `counted` is bool [s, b]; None: all."""
    state = state[..., 0]
    drops = (logits > 0).float() * (_DROP - _KEEP) + _KEEP
    if counted is not None and len(counted) > 1:  # tokens first, in order
        order = (~counted).int().argsort(dim=0, stable=True)
        drops = drops.gather(0, order[..., None].expand_as(drops))
    # The first token of all decides about none: behind a 0 it says _KEEP.
    first = torch.minimum(drops[:1], state[-1:] + _KEEP)
    if counted is not None:
        first = first.where(counted.any(0)[:, None], 0.0)
    everything = torch.cat((state, first, drops[1:]))
    hides = everything[: len(state) + 1] == _DROP
    if counted is None:
        return hides, everything[-len(state) :, ..., None]
    index = torch.arange(len(state), device=state.device)[:, None] + counted.sum(0)
    return hides, everything.gather(0, index[..., None].expand_as(state))[..., None]
