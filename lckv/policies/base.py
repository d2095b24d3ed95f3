"""What a KV policy is: the rule that says what is kept of the keys and values along the sequence.

A policy stands between the projections of a layer and its attention. The layer that computes keys and values
asks it once per pass; every layer that reads them gets the result as tensors. A policy keeps no tensors: what
it needs later it returns.

Shapes: b batch rows, s tokens, h query heads, g KV heads (those of this rank), d channels of a head, n slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lckv.attention.visibility import Documents


class KeyValue(NamedTuple):
    """What readers of a layer attend to."""

    key: Tensor
    """[s, b, g, d], rotated to absolute positions. Where the policy biases keys, channel d - 1 is the
    bias."""

    value: Tensor
    """[s, b, g, d]."""


class Statistics(NamedTuple):
    """What a layer's policy reports of one micro-batch, as tensors through which its auxiliary loss is
    differentiated."""

    merge_rate: Tensor
    """float32 [b, g]: share of the row's tokens that were merged instead of appended, in 0 .. 1."""


@dataclass(frozen=True, eq=False)
class TokenContext:
    """What a policy may need to know of the tokens whose keys and values it is given."""

    rotate: Callable[[Tensor], Tensor]
    """RoPE at the tokens' positions, [s, b, any heads, d] to the same."""

    documents: Documents | None = None
    """Document boundaries; None: every row is one document."""

    counted: Tensor | None = None
    """bool [s, b]: tokens that are not padding; None: all. Padding neither merges nor counts."""

    noise: Tensor | None = None
    """What `KVPolicy.draw_noise` returned for this layer and micro-batch, KV heads of this rank."""

    training: bool = False
    """Whether decisions are soft and noisy."""

    progress: float = 1.0
    """Share of training that is done, 0 .. 1."""


class Extension(NamedTuple):
    """What new tokens add to those that an inference cache holds."""

    key: Tensor
    """[s, b, g, d] as in `KeyValue`, of the new tokens."""

    value: Tensor
    """[s, b, g, d]."""

    joins: Tensor | None = None
    """bool [b, g]: the first new token is merged into the newest slot of the cache, which is hidden from
    whoever sees that token, and replaced by the slot that it becomes. None: never."""

    state: Tensor | None = None
    """What `KVPolicy.extend` needs to know of these tokens when the next ones come: [n, b, g, c], n fixed.
    None: nothing."""


class KVPolicy(Protocol):
    """A KV policy. Every sharing map works with every policy."""

    name: str

    reads_query: bool
    """Whether keys and values depend on the queries of the layer that computes them."""

    biases_keys: bool
    """Whether channel d - 1 of keys is a bias on their score and that of queries the constant that brings it
    there; a query's newest visible key (its frontier) is seen without bias."""

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """Randomness of one layer and micro-batch for `shape` [s, b, all KV heads], one seed per row.

        It depends on nothing but the seeds, so that it is the same in every pass of the plan, in
        recomputation, after a resume and in every layout. None if the policy is deterministic.
        """
        ...

    def query(self, query: Tensor, context: TokenContext) -> Tensor:
        """Queries [s, b, h, d] before RoPE to those that attend."""
        ...

    def keys_values(
        self, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics | None]:
        """Keys and values [s, b, g, d] before RoPE to what readers attend to. `query` [s, b, h, d] before
        RoPE is given iff `reads_query`."""
        ...

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> Extension:
        """As `keys_values` in evaluation, for tokens that follow those of a cache. `state` is that of the
        extension before; None: there are no earlier tokens."""
        ...

    def whole(self, extension: Extension) -> Tensor | None:
        """bool [s, b, g]: new tokens whose entry is a whole slot, which is what the cache keeps; None:
        all."""
        ...

    def auxiliary_loss(self, merge_rate: Tensor, progress: float) -> Tensor | None:
        """Loss of each row [b] from its merge rate [b], the mean over all layers and KV heads; None: no
        loss."""
        ...
