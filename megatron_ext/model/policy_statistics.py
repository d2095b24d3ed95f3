"""A KV policy on Megatron's ranks: its noise, and its statistics (or the errors of passes) summed over heads,
layers and stages.

Shapes: b micro-batch, s tokens of a row, G KV heads of the model, g those of this rank, n statistics of the
policy, R parts of a sum (see `StatisticSums`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from lckv.pass_errors import reporter_of
from lckv.policies.base import Statistics
from megatron_ext.model.policy_projection import kv_heads_of_rank
from megatron_ext.model.transformer_config import SharedKVTransformerConfig
from megatron_ext.parallel.chunks import ChunkRows
from megatron_ext.parallel.context import ContextGroup


@dataclass(frozen=True, eq=False)
class PolicyInputs:
    """What a KV policy needs to know of a micro-batch and of the run."""

    row_seeds: tuple[int, ...] = ()
    """One per row in training, from run and sample alone; none in evaluation."""

    counted: Tensor | None = None
    """bool [b, s]: tokens that are not padding; None: all."""

    chunk_rows: ChunkRows | None = None
    """With context parallelism, what the policy knows of the rank's chunks."""

    progress: float = 1.0
    """Share of the run that is done, 0 .. 1."""


@dataclass(frozen=True, eq=False)
class PolicyReport:
    """What the KV policy did in one micro-batch, up to and including this pipeline stage."""

    statistics: Mapping[int, Statistics] = field(default_factory=dict)
    """Of each layer of this stage that computes keys and values, n tensors float32 [b, g], without graph.
    With context parallelism what this rank's tokens add to those of the rows."""

    sums: Tensor | None = None
    """float32 [b, n R]: differentiable sums of them over layers and KV heads of this and earlier stages;
    None without statistics."""

    auxiliary_loss: Tensor | None = None
    """float32 [b], on the last stage."""


def row_seed(run_seed: int, sample_id: int) -> int:
    """The seed of one row's randomness: the same wherever and whenever the sample
    is trained on in this run."""
    return _seed(run_seed, sample_id)


def _seed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class StatisticSums:
    """Sums what layers report over the KV heads of all ranks and the layers of a model.

    A sum has one part, over all KV heads. Where the policy's loss is computed per tensor-parallel rank, it
    has a part for every rank: part r is the sum over the heads of rank r.
    """

    def __init__(
        self,
        config: SharedKVTransformerConfig,
        group: torch.distributed.ProcessGroup,
        context_group: ContextGroup,
    ) -> None:
        self._policy = config.compression.policy.build()
        self.reporter = reporter_of(config.compression)
        """Who says what the statistics are."""
        self.layers: tuple[int, ...] = ()
        """The layers that have them, of the map that the block runs; the block sets it."""
        self._group, self._context_group = group, context_group
        self._heads = config.num_query_groups
        self._parts = group.size() if self.reporter.per_rank else 1
        self.columns = len(self.reporter.statistics) * self._parts
        """n R."""

    def noise(
        self, shape: tuple[int, int], row_seeds: tuple[int, ...], layer: int, device: torch.device
    ) -> Tensor | None:
        """This rank's part [s, b, g] of the noise of `layer` for `shape` (s, b); the same in every layout."""
        if not row_seeds:
            return None
        seeds = [_seed(seed, layer) for seed in row_seeds]
        noise = self._policy.draw_noise((*shape, self._heads), seeds, device)
        return None if noise is None else noise[..., kv_heads_of_rank(self._heads, self._group)]

    def add(self, earlier: Tensor | None, statistics: Mapping[int, Statistics]) -> Tensor | None:
        """`earlier` [b, n R] and the statistics of this stage's layers."""
        if not self.columns or not statistics:
            return earlier
        # layers x n x [b, g] to [b, n, 1]
        local = torch.stack([torch.stack(values) for values in statistics.values()]).sum((0, 3)).T[:, :, None]
        if self.reporter.per_rank:
            part = torch.arange(self._parts, device=local.device) == self._group.rank()
            local = local * part  # [b, n, R]
        # contiguous: of others Megatron reduces a copy, and returns what it was given
        summed = reduce_from_tensor_model_parallel_region(local.flatten(1).contiguous(), group=self._group)
        return summed if earlier is None else earlier + summed

    def auxiliary_loss(self, sums: Tensor | None, progress: float) -> Tensor | None:
        """The policy's loss of each row [b] from the sums [b, n R] over all layers."""
        if sums is None:
            return None
        sums = self._context_group.sum(sums)
        copies = max(1, self._group.size() // self._heads)
        heads = max(1, self._heads // self._group.size()) if self.reporter.per_rank else self._heads * copies
        means = sums.unflatten(1, (-1, self._parts)) / (len(self.layers) * heads)  # [b, n, R]
        return self.reporter.auxiliary_loss(
            (means if self.reporter.per_rank else means[..., 0]).unbind(1), progress
        )
