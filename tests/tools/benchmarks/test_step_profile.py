"""The profile of a step: launches of a layer, counted by the profiler."""

import torch

from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.process_groups import initialize
from tests.ranks import run_on_ranks
from tools.benchmarks.operators import is_kernel, kernels_of
from tools.benchmarks.step_profile import kinds, step_of
from tools.benchmarks.training_step import Sizes

SIZES = Sizes(64, 2, 1, 64, 512, 1, "fp32", num_layers=1)


def launches() -> dict[str, dict[str, int]]:
    """Kernels by operator, of a step of each kind."""
    initialize(ParallelConfig(), seed=1)
    tokens = torch.zeros(1, SIZES.seq_length, dtype=torch.int64)
    return {
        name: dict(kernels_of(step_of(SIZES, kind, tokens)))
        for name, kind in kinds().items()
        if "plain" not in name
    }


def test_launches_of_a_step_do_not_grow_with_documents() -> None:
    (counted,) = run_on_ranks(1, launches)
    for name in ("excluded self", "dmc"):
        assert counted[f"{name}, 4 documents"] == counted[f"{name}, 64 documents"]
        assert counted[name]["_scaled_dot_product_flash_attention_for_cpu_backward"] == 1
        batches = counted[f"{name}, 64 documents"]["_scaled_dot_product_flash_attention_for_cpu"]
        assert batches == 2  # one for each of the two lengths


def test_what_a_kernel_is() -> None:
    for name in ("aten::mul", "aten::copy_", "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert is_kernel(name)
    for name in ("aten::empty_strided", "aten::to", "aten::reshape", "aten::slice", "aten::split"):
        assert not is_kernel(name)
