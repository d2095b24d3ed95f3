"""The statistics of a KV policy over all ranks: per layer and KV head, and what its loss is."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from lckv.pass_errors import Reporter
from lckv.policies.base import statistics_by_name
from megatron_ext.model.policy_projection import kv_heads_of_rank
from megatron_ext.model.policy_statistics import PolicyReport, StatisticSums
from megatron_ext.parallel.process_groups import device_of_rank

_NAMED = 8
"""Places that an error names."""


class NonFiniteStatisticError(ArithmeticError):
    """A number that a KV policy reports is infinite or not a number."""


@dataclass(frozen=True)
class PolicyMeans:
    """What a policy did in some micro-batches of all ranks; the same on every rank."""

    layers: tuple[int, ...]
    """Layers that report, ascending."""

    means: Mapping[str, Tensor]
    """Mean over rows of each statistic by its name, float64 [layers, KV heads of the model], on the CPU."""

    auxiliary_loss: float
    """Mean over rows of the policy's loss."""

    def report(self, reporter: Reporter, progress: float | None) -> dict[str, float]:
        """The numbers that `reporter` makes of it; `progress` as in `KVPolicy.report`."""
        return reporter.report(tuple(self.means.values()), self.auxiliary_loss, progress)

    def by_head(self) -> dict[str, float]:
        """Every mean as NAME/layer_0/head_0."""
        return {
            f"{name}/layer_{layer}/head_{head}": mean
            for name, means in self.means.items()
            for layer, heads in zip(self.layers, means.tolist(), strict=True)
            for head, mean in enumerate(heads)
        }

    def require_finite(self, iteration: int, samples: str) -> None:
        """Raises NonFiniteStatisticError with iteration, statistic, layer and head where a mean is not
        finite, and with what is known of the `samples`."""
        for name, means in self.means.items():
            wrong = (~means.isfinite()).nonzero().tolist()
            if wrong:
                places = ", ".join(
                    f"layer {self.layers[layer]} KV head {head}" for layer, head in wrong[:_NAMED]
                )
                more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
                raise NonFiniteStatisticError(
                    f"iteration {iteration}: {name} of {places}{more} is not finite ({samples}); lower "
                    "optimizer.lr, or resume from an earlier checkpoint."
                )


class StatisticsMeter:
    """Adds up the reports of a stage's micro-batches; `total` brings all ranks together."""

    def __init__(self, model: MegatronModule) -> None:
        decoder = get_attr_wrapped_model(model, "decoder")
        self._reporter: Reporter = decoder.statistics.reporter
        self._statistics: StatisticSums = decoder.statistics
        self._heads: int = decoder.config.num_query_groups
        self._mine: slice = kv_heads_of_rank(self._heads, decoder.pg_collection.tp)
        self._sums: dict[int, Tensor] = {}
        self._rows = 0
        self._loss: Tensor | None = None

    def add(self, report: PolicyReport) -> None:
        """One micro-batch of this stage."""
        for layer, values in report.statistics.items():
            stacked = torch.stack(values)  # [n, b, g]
            self._sums[layer] = self._sums.get(layer, 0) + stacked.double().sum(1)
            self._rows += stacked.shape[1] if layer == next(iter(report.statistics)) else 0
        if report.auxiliary_loss is not None:
            loss = report.auxiliary_loss.detach().double()
            lost = torch.stack((loss.sum(), loss.new_tensor(len(loss))))
            self._loss = lost if self._loss is None else self._loss + lost

    def total(self) -> PolicyMeans | None:
        """Of steps with the map that the model runs now. Collective over all ranks; None for a policy without
        statistics."""
        layers = self._statistics.layers
        count = len(self._reporter.statistics)
        if not count:
            return None
        # for each statistic, layer and head: sum and number of rows; then sum and number of the loss
        shape = (count, len(layers), self._heads)
        table = torch.zeros(2, torch.Size(shape).numel() + 1, dtype=torch.float64, device=device_of_rank())
        has_first_chunk = parallel_state.get_context_parallel_rank() == 0
        grid = table[:, :-1].view(2, *shape)
        for place, layer in enumerate(layers):
            if layer in self._sums:
                grid[0, :, place, self._mine] = self._sums[layer]
                # ranks that share rows add up to what they report of them
                grid[1, :, place, self._mine] = self._rows if has_first_chunk else 0
        if (
            self._loss is not None
            and has_first_chunk
            and parallel_state.get_tensor_model_parallel_rank() == 0
        ):
            table[:, -1] = self._loss
        dist.all_reduce(table)
        means = (table[0] / table[1].clamp(min=1)).cpu()
        named = statistics_by_name(self._reporter, means[:-1].view(shape).unbind())
        return PolicyMeans(layers, named, means[-1].item())
