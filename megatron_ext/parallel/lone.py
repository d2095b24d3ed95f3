"""Data parallelism of one rank: there is nobody to reduce gradients with, or to gather weights from."""

from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_ext.config import ParallelConfig


class LoneDataParallel(DistributedDataParallel):
    """Megatron's, without its collectives. In a group of one rank they leave all numbers as they are, but
    gloo copies whole buffers for each of them."""

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """The weights are all here."""

    def start_grad_sync(self, *unused: Any) -> None:
        """The gradients are all here."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """The gradients are all here."""


def data_parallel_class(parallel: ParallelConfig) -> type[DistributedDataParallel]:
    """How gradients are reduced on this rank. What overlaps is Megatron's own: its hooks count parameters."""
    alone = parallel_state.get_data_parallel_world_size(with_context_parallel=True) == 1
    overlaps = parallel.overlap_grad_reduce or parallel.overlap_param_gather
    return LoneDataParallel if alone and not overlaps else DistributedDataParallel
