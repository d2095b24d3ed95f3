"""How much a KV policy merges, over all ranks: per layer and KV head, and what its loss is."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_ext.model.merging import PolicyReport
from megatron_ext.parallel.process_groups import device_of_rank


@dataclass(frozen=True)
class Merging:
    """What was merged in some micro-batches of all ranks; the same on every rank."""

    layers: tuple[int, ...]
    """Layers that compute keys and values, ascending."""

    rates: Tensor
    """float64 [layers, KV heads of the model], on the CPU: share of tokens merged, NaN where a decision was
    not finite."""

    auxiliary_loss: float
    """Mean over rows of the policy's loss."""

    @property
    def compression_ratio(self) -> float:
        """Tokens per slot over all layers and heads."""
        return ratio(self.rates.mean().item())


def ratio(merge_rate: float) -> float:
    """Tokens per slot where a share `merge_rate` of tokens is merged."""
    return 1.0 / max(1.0 - merge_rate, 1e-9)


class MergeRateMeter:
    """Adds up the reports of a stage's micro-batches; `total` brings all ranks together."""

    def __init__(self, model: MegatronModule) -> None:
        decoder = get_attr_wrapped_model(model, "decoder")
        self._layers: tuple[int, ...] = decoder.layer_types.kv_layers
        self._heads: int = decoder.config.num_query_groups
        self._mine: slice = decoder.merge_rates.local_heads()
        self._active = decoder.merge_rates.columns > 0
        self._sums: dict[int, Tensor] = {}
        self._rows = 0
        self._loss: Tensor | None = None

    def add(self, report: PolicyReport) -> None:
        """One micro-batch of this stage."""
        for layer, rates in report.merge_rates.items():
            self._sums[layer] = self._sums.get(layer, 0) + rates.double().sum(0)
            self._rows += len(rates) if layer == next(iter(report.merge_rates)) else 0
        if report.auxiliary_loss is not None:
            loss = report.auxiliary_loss.detach().double()
            lost = torch.stack((loss.sum(), loss.new_tensor(len(loss))))
            self._loss = lost if self._loss is None else self._loss + lost

    def total(self) -> Merging | None:
        """Collective over all ranks; None for a policy that merges nothing."""
        if not self._active:
            return None
            # per layer and head: sum of rates and number of rows; then sum and number of the loss
        table = torch.zeros(
            2, len(self._layers) * self._heads + 1, dtype=torch.float64, device=device_of_rank()
        )
        grid = table[:, :-1].view(2, len(self._layers), self._heads)
        for place, layer in enumerate(self._layers):
            if layer in self._sums:
                grid[0, place, self._mine] = self._sums[layer]
                grid[1, place, self._mine] = self._rows
        if self._loss is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            table[:, -1] = self._loss
        dist.all_reduce(table)
        means = (table[0] / table[1].clamp(min=1)).cpu()
        return Merging(self._layers, means[:-1].view(len(self._layers), self._heads), means[-1].item())
