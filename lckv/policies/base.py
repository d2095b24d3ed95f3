"""What a KV policy is: the rule that says what is kept of the keys and values along the sequence.

A policy stands between the projections of a layer and its attention. The layer that computes keys and values asks it once per
pass; every layer that reads them gets the result as tensors. A policy keeps no tensors: what it needs later it returns.

Shapes: b batch rows, s tokens, h query heads, g KV heads (those of this rank), d channels of a head, k kept entries.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lckv.attention.visibility import Documents


class KeyValue(NamedTuple):
    """What readers of a layer attend to."""

    key: Tensor
    """[s, b, g, d], rotated to absolute positions."""

    value: Tensor
    """[s, b, g, d]."""

    key_bias: Tensor | None = None
    """float32 [s, b, g], added to the scores of a key; None: no bias."""


class Statistics(NamedTuple):
    """What a layer's policy reports of one micro-batch, as tensors through which its auxiliary loss is differentiated."""

    kept: Tensor
    """[s, b, g]: how much of each token opens an entry of its own (1 append, 0 merge)."""


class KVPolicy(Protocol):
    """A KV policy. Every sharing map works with every policy."""

    name: str

    reads_query: bool
    """Whether keys and values depend on the queries of the layer that computes them."""

    def draw_noise(self, shape: Sequence[int], device: torch.device, generator: torch.Generator) -> Tensor | None:
        """Randomness of one layer and micro-batch with statistics of `shape` [s, b, g], drawn once from a tracked generator and
        used in every pass of the plan and in recomputation; None if the policy is deterministic."""
        ...

    def query(self, query: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        """Queries [s, b, h, d] before RoPE to those that attend."""
        ...

    def keys_values(
        self,
        key: Tensor,
        value: Tensor,
        rotate: Callable[[Tensor], Tensor],
        *,
        query: Tensor | None,
        noise: Tensor | None,
        documents: Documents | None,
        training: bool,
    ) -> tuple[KeyValue, Statistics | None]:
        """Keys and values [s, b, g, d] before RoPE to what readers attend to. `query` [s, b, h, d] before RoPE is given iff
        `reads_query`."""
        ...

    def auxiliary_loss(self, statistics: Sequence[Statistics], progress: float) -> Tensor | None:
        """Loss per sample [b] from the statistics of all layers at `progress` 0 .. 1 of training; None: no loss."""
        ...

    def update_slots(self, slots: KeyValue | None, new: KeyValue, statistics: Statistics | None) -> KeyValue:
        """The entries kept [k, b, g, d] after one more token's key and value [1, b, g, d] (inference, token by token)."""
        ...
