"""What a layer knows of the tokens of a micro-batch, and how a KV policy works on the chunks of rows that a
rank has.

Shapes: as in `megatron_ext.parallel.chunks`; h query heads, g KV heads of this rank, d channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from lckv.policies.base import KeyValue, KVPolicy, Statistics, TokenContext
from lckv.sharing.execution import Two
from megatron_ext.parallel.context import ContextGroup

Source = KeyValue | Two[KeyValue]
"""What a layer takes of another, or of the two that it reads."""


def tensors_of_source(source: Source | None) -> tuple[Tensor, ...]:
    """What `source_of_tensors` puts together again."""
    if isinstance(source, Two):
        return *source.first, *source.second
    return () if source is None else tuple(source)


def source_of_tensors(tensors: Sequence[Tensor]) -> Source | None:
    """From keys and values of no layer, of one, or of two."""
    if not tensors:
        return None
    first, second = KeyValue(*tensors[:2]), tensors[2:]
    return Two(first, KeyValue(*second)) if second else first


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What a layer knows of the tokens."""

    tokens: TokenContext
    """Of those that this rank has; documents are those of whole rows."""

    chunks: TokenContext | None = None
    """With context parallelism: of the rank's chunks as rows, with the tokens around them; None: the rank has
    whole rows."""

    def with_noise(self, noise: Tensor | None, group: ContextGroup) -> "LayerContext":
        """With the policy's `noise` for whole rows [s, b, g]."""
        if self.chunks is None:
            return replace(self, tokens=replace(self.tokens, noise=noise))
        assert self.chunks.part is not None
        rows = None if noise is None else group.chunks.rows(noise, self.chunks.part.reach)
        return replace(self, chunks=replace(self.chunks, noise=rows))


class Own(NamedTuple):
    """What a layer makes of its own keys and values."""

    key_value: KeyValue
    """Of whole rows: what readers attend to."""

    statistics: Statistics
    """What its KV policy reports."""

    lends: KeyValue | None = None
    """[n c, b, g, d] as the policy gets them, for layers above that mix them into their own; None: none
    does."""


def keys_values(
    policy: KVPolicy,
    key: Tensor,
    value: Tensor,
    read: Tensor | None,
    context: LayerContext,
    group: ContextGroup,
) -> tuple[KeyValue, Statistics]:
    """`KVPolicy.keys_values` of whole rows, from what this rank has of them: key and value [n c, b, g, d],
    and what the policy reads besides [n c, b, ...]. Statistics [b, g] are what the rank's tokens add to those
    of the rows."""
    if context.chunks is None:
        return policy.keys_values(key, value, read, context.tokens)
    assert context.chunks.part is not None
    reach = context.chunks.part.reach
    tensors = [key, value] if read is None else [key, value, read]
    key, value, *others = group.rows(tensors, reach)
    rows, statistics = policy.keys_values(key, value, others[0] if others else None, context.chunks)
    own = KeyValue(*(group.parts(tensor, reach) for tensor in rows))
    chunks = len(group.chunks.numbers)
    # [n b, g] to [n, b, g] to [b, g]
    return group.kept(own), tuple(value.unflatten(0, (chunks, -1)).sum(0) for value in statistics)
