"""Sequences of different lengths for kernels that take rows of equal length: those of about the same length
lie side by side, padded to the longest of them.

Lengths of a batch differ by at most a factor of sqrt(2), so the number of batches depends on how much lengths
differ, not on how many sequences there are. A padded token stands behind all others of its sequence: causal
attention of the others does not see it.

Shapes: tokens [t, heads, d], all rows one after the other; batches [n, heads, length, d].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lckv.attention.flash_pair import FlashPair, Gradients, Partial, Problem
from lckv.attention.sequences import CLOSED, Sequences, layout_of
from lckv.attention.visibility import Documents, to_device


@dataclass(frozen=True)
class Batches:
    """Where tokens lie in batches, which follow each other. Indices are int64, on the device."""

    shapes: tuple[tuple[int, int], ...]
    """Sequences and length of each batch."""

    token: Tensor
    """Of each place in the batches; of a padded place, the last of its sequence."""

    padding: Tensor
    """Padded places."""

    place: Tensor
    """Of each token [t]; of a closed one, any."""

    def spread(self, rows: Tensor, padding: float | None = None) -> list[Tensor]:
        """[b, heads, s, ...] to batches [n, heads, length, ...];
        `padding` goes to padded places, None: anything finite."""
        places = rows.transpose(1, 2).flatten(0, 1).index_select(0, self.token)
        if padding is not None:
            places.index_fill_(0, self.padding, padding)
        parts = places.split([count * length for count, length in self.shapes])
        return [
            part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def gather(self, batches: Sequence[Tensor], rows: int) -> Tensor:
        """Batches to [b, heads, s, ...], b = `rows`; of closed tokens, anything."""
        parts = [batch.transpose(1, 2).flatten(0, 1) for batch in batches]
        places = parts[0] if len(parts) == 1 else torch.cat(parts)
        return places.index_select(0, self.place).unflatten(0, (rows, -1)).transpose(1, 2)


def batches_of(sequences: Sequences) -> Batches:
    """The open sequences, by their lengths; made once."""
    return sequences.once("batches", lambda: _batches_of(sequences))


def _batches_of(sequences: Sequences) -> Batches:
    is_open, lengths = ~sequences.is_closed, sequences.lengths
    kind = np.floor(2 * np.log2(lengths)).astype(np.int64)
    place = np.zeros(int(sequences.bounds[-1]), dtype=np.int64)
    shapes, tokens, paddings, begin = [], [], [], 0
    for number in np.unique(kind[is_open]):
        chosen = is_open & (kind == number)
        own, starts = lengths[chosen, None], sequences.bounds[:-1][chosen, None]
        offset = np.arange(own.max())[None]
        token, padded = starts + np.minimum(offset, own - 1), offset >= own
        places = begin + np.arange(token.size).reshape(token.shape)
        place[token[~padded]] = places[~padded]
        shapes.append(token.shape)
        tokens.append(token.reshape(-1))
        paddings.append(places[padded])
        begin += token.size
    indices = (np.concatenate(tokens), np.concatenate(paddings), place)
    on_host = [torch.tensor(index.tolist(), dtype=torch.int64) for index in indices]
    return Batches(tuple(shapes), *(to_device(index, sequences.device) for index in on_host))


def forward_in_batches(pair: FlashPair, problem: Problem) -> Partial:
    """The forward of `pair`, which takes no sequences, of a `problem` that has some."""
    sequences, rows = problem.sequences, len(problem.query)
    assert sequences is not None
    batches = batches_of(sequences)
    partials = [pair.forward(part) for part in _parts(batches, problem)]
    output = batches.gather([partial.output for partial in partials], rows)
    lse = batches.gather([partial.lse for partial in partials], rows)
    sequences.close(_tokens(output), 0.0)
    sequences.close(_tokens(lse), CLOSED)
    return Partial(output, lse, tuple(partial.rest for partial in partials))


def backward_in_batches(pair: FlashPair, gradient: Tensor, problem: Problem, partial: Partial) -> Gradients:
    """Its backward."""
    sequences, rows = problem.sequences, len(problem.query)
    assert sequences is not None
    batches = batches_of(sequences)
    wholes = map(Partial, batches.spread(partial.output), batches.spread(partial.lse), partial.rest)
    parts = [
        pair.backward(*of_batch)
        for of_batch in zip(batches.spread(gradient, 0.0), _parts(batches, problem), wholes, strict=True)
    ]
    dq, dk, dv = (batches.gather(parts_of_one, rows) for parts_of_one in zip(*parts, strict=True))
    for tensor in (dq, dk, dv):
        sequences.close(_tokens(tensor), 0.0)
    return dq, dk, dv


def _parts(batches: Batches, problem: Problem) -> list[Problem]:
    """A problem of each batch."""
    heads = (batches.spread(tensor) for tensor in problem[:3])
    return [
        Problem(query, key, value, problem.scale, causal=True)
        for query, key, value in zip(*heads, strict=True)
    ]


def _tokens(rows: Tensor) -> Tensor:
    """[b, heads, s, ...], of `Batches.gather`, to a view [t, heads, ...]."""
    return rows.transpose(1, 2).flatten(0, 1)


def attend_in_batches(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, documents: Documents
) -> Tensor:
    """attend(query, key, value) of rows whose tokens all see each other as far as causality lets them, for
    rows of `documents`: [b, heads, s, d]."""
    rows, _, tokens, _ = query.shape
    sequences = layout_of(documents, rows, tokens, tokens, behind=0).sequences
    if sequences is None:
        return attend(query, key, value)
    batches = batches_of(sequences)
    heads = (_Spread.apply(tensor, batches) for tensor in (query, key, value))
    outputs = [attend(*tensors) for tensors in zip(*heads, strict=True)]
    return _Gather.apply(rows, batches, *outputs)


class _Spread(torch.autograd.Function):
    """`Batches.spread`. Nobody sees padded places, so their gradients are 0."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, batches: Batches) -> tuple[Tensor, ...]:
        ctx.rows, ctx.batches = len(rows), batches
        return tuple(batches.spread(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.batches.gather(gradients, ctx.rows), None


class _Gather(torch.autograd.Function):
    """`Batches.gather`, of tokens that are all open."""

    @staticmethod
    def forward(ctx: Any, rows: int, batches: Batches, *parts: Tensor) -> Tensor:
        ctx.batches = batches
        return batches.gather(parts, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.batches.spread(gradient, 0.0)
