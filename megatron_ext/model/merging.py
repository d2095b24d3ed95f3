"""A KV policy that merges tokens, on Megatron's ranks: its noise, and its merge rates summed over heads,
layers and stages.

Shapes: b micro-batch, s tokens, G KV heads of the model, g those of this rank, R columns (see `MergeRates`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from lckv.policies.base import KVPolicy, Statistics
from megatron_ext.model.transformer_config import SharedKVTransformerConfig


@dataclass(frozen=True, eq=False)
class PolicyInputs:
    """What a KV policy needs to know of a micro-batch and of the run."""

    row_seeds: tuple[int, ...] = ()
    """One per row in training, from run and sample alone; none in evaluation."""

    counted: Tensor | None = None
    """bool [b, s]: tokens that are not padding; None: all."""

    progress: float = 1.0
    """Share of the run that is done, 0 .. 1."""


@dataclass(frozen=True, eq=False)
class PolicyReport:
    """What the KV policy did in one micro-batch, up to and including this pipeline stage."""

    merge_rates: Mapping[int, Tensor] = field(default_factory=dict)
    """float32 [b, g] of each layer of this stage that computes keys and values, without graph."""

    rate_sum: Tensor | None = None
    """float32 [b, R]: differentiable sum over layers and KV heads of this and earlier stages; None without
    merging."""

    auxiliary_loss: Tensor | None = None
    """float32 [b], on the last stage."""


def row_seed(run_seed: int, sample_id: int) -> int:
    """The seed of one row's randomness: the same wherever and whenever the sample is trained on in this
    run."""
    return _seed(run_seed, sample_id)


def _seed(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class MergeRates:
    """Sums merge rates over the KV heads of all ranks and the layers of a model.

    One column [b, 1] holds the sum over all KV heads. Where the loss is to be computed per tensor-parallel
    rank, as the public code does, column r holds the sum over the heads of rank r.
    """

    def __init__(
        self, config: SharedKVTransformerConfig, policy: KVPolicy, group: torch.distributed.ProcessGroup
    ) -> None:
        settings = config.compression.policy
        self._policy, self._group = policy, group
        self._per_rank = bool(getattr(settings, "loss_per_tp_rank", False))
        self._heads = config.num_query_groups
        self._layers = len(config.layer_types.kv_layers)
        self.columns = (group.size() if self._per_rank else 1) if policy.biases_keys else 0

    def local_heads(self) -> slice:
        """Which of the model's KV heads this rank has; with more ranks than heads, several ranks have the
        same."""
        mine = max(1, self._heads // self._group.size())
        first = self._group.rank() * self._heads // self._group.size()
        return slice(first, first + mine)

    def noise(
        self, shape: tuple[int, int], row_seeds: tuple[int, ...], layer: int, device: torch.device
    ) -> Tensor | None:
        """This rank's part [s, b, g] of the noise of `layer` for `shape` (s, b); the same in every layout."""
        if not row_seeds or not self.columns:
            return None
        seeds = [_seed(seed, layer) for seed in row_seeds]
        noise = self._policy.draw_noise((*shape, self._heads), seeds, device)
        return None if noise is None else noise[..., self.local_heads()]

    def add(self, earlier: Tensor | None, statistics: Mapping[int, Statistics]) -> Tensor | None:
        """`earlier` [b, R] and the rates of this stage's layers."""
        if not self.columns:
            return None
        total = earlier
        if statistics:
            local = torch.stack([reported.merge_rate for reported in statistics.values()]).sum((0, 2))[
                :, None
            ]
            if self._per_rank:
                column = torch.arange(self.columns, device=local.device) == self._group.rank()
                local = local * column
            summed = reduce_from_tensor_model_parallel_region(local, group=self._group)
            total = summed if total is None else total + summed
        return total

    def auxiliary_loss(self, rate_sum: Tensor | None, progress: float) -> Tensor | None:
        """The policy's loss of each row [b] from the sum over all layers."""
        if rate_sum is None:
            return None
        copies = max(1, self._group.size() // self._heads)
        heads = max(1, self._heads // self._group.size()) if self._per_rank else self._heads * copies
        mean = rate_sum / (self._layers * heads)
        return self._policy.auxiliary_loss(mean if self._per_rank else mean[:, 0], progress)
