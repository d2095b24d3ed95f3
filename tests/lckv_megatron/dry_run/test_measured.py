"""The dry run's memory and collectives beside those of real training steps on CPUs, without CUDA and NCCL."""

from functools import cache

import pytest

from lckv_megatron.dry_run.collectives import kind_of
from lckv_megatron.dry_run.rank import RankRun
from tests.lckv_megatron.dry_run.measured import ADAPTER, LEARNING, Case, Measured, measured, predicted
from tests.ranks import run_on_ranks

TOLERANCE = 0.02
"""Of the peak. 0.1 % is what these cases miss it by."""


def small(layers: int, layer_types: str | None = None, *options: str) -> tuple[str, ...]:
    compression = ("--compression.layer_types", layer_types) if layer_types else ()
    return ("--model.num_layers", str(layers), *compression, *options)


PASSES = ("--compression.forward_passes", "2", "--compression.backward_passes", "2")
RING = ("--parallel.context_parallel_communication", "ring")
FULL = ("--train.recompute_granularity", "full")
WIDE = ("--model.hidden_size", "512", "--train.precision", "fp32")
BOTH_SIDES = {
    "plain, recomputed": Case("demo/pretrain.yaml", options=small(3, "0_1_2", *FULL)),
    "merging": Case("llama2_13b_dmc/retrofit.yaml", options=small(2)),
    "lckv, TP 2": Case("llama2_13b_lckv/pretrain.yaml", tensor=2, options=small(4, "0_2_2_3", *PASSES)),
    "shared, DP 2": Case("llama_1b_lckv/pretrain.yaml", data=2, options=small(2, "0_0")),
    "shared, PP 2": Case("llama_1b_lckv/pretrain.yaml", pipeline=2, options=small(4, "0_1_1_1")),
    "learning": Case(
        "demo/pretrain.yaml", options=small(2, "0_0", *LEARNING), teacher=small(3, "0_1_2", *WIDE)
    ),
    "learning, PP 2": Case(
        "demo/pretrain.yaml",
        pipeline=2,
        options=small(2, "0_1", *LEARNING, "--train.global_batch_size", "16"),
        teacher=small(4, "0_1_2_3", *WIDE),
    ),
    "adapter, from itself": Case(
        "demo/pretrain.yaml", options=small(3, "0_0_2", *LEARNING, *ADAPTER), teacher=small(3, "0_0_2")
    ),
    "merging, CP 2": Case("llama2_13b_dmc/retrofit.yaml", context=2, options=small(2)),
    "merging, CP 2, ring": Case("llama2_13b_dmc/retrofit.yaml", context=2, options=small(2, None, *RING)),
}
cases = pytest.mark.parametrize("name", BOTH_SIDES)


@cache
def both(name: str) -> list[tuple[Measured, RankRun]]:
    """Of each rank: what was measured, and what the dry run says of its stage."""
    case = BOTH_SIDES[name]
    real = run_on_ranks(case.world_size, measured, case.run, case.described)
    stages = [
        predicted(case.run, rank=rank, world_size=case.world_size, teacher=case.described)
        for rank in range(0, case.world_size, case.world_size // case.pipeline)
    ]
    return [(step, stages[rank * case.pipeline // case.world_size]) for rank, step in enumerate(real)]


@cases
def test_the_peak_of_memory_is_that_of_the_allocator(name: str) -> None:
    for step, run in both(name):
        assert run.memory.peak_bytes == pytest.approx(step.peak, rel=TOLERANCE)


@cases
def test_collectives_are_those_that_are_issued(name: str) -> None:
    for step, run in both(name):
        issued: dict[tuple[str, int], tuple[int, int]] = {}
        for (operation, ranks), (count, number) in step.issued.items():
            if ranks > 1:
                key = kind_of(operation.split("::")[1]), ranks
                before = issued.get(key, (0, 0))
                issued[key] = before[0] + count, before[1] + number
        said: dict[tuple[str, int], tuple[int, int]] = {}
        for (kind, _, ranks), total in run.collectives.items():
            # a gather and a scatter are given the whole and a rank's part of it
            parts = 1 / ranks if kind in ("all-gather", "reduce-scatter") else 0
            before = said.get((kind, ranks), (0, 0))
            said[kind, ranks] = before[0] + total.count, before[1] + round(total.bytes * (1 + parts))
        assert said == issued
        assert bool(said) == (BOTH_SIDES[name].world_size > 1)
