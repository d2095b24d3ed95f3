"""Times training steps on two tensor-parallel ranks, plain and LCKV, with and without the collectives of
a data-parallel group of one rank.

    torchrun --nproc-per-node 2 -m tools.benchmarks.tensor_parallel --output FILE.csv

Both kinds run in turns. Seconds are those in which rank 0 computed, on all its threads, also those of gloo.
"""

import argparse
from functools import partial
from pathlib import Path

import torch.distributed as dist

from lckv.config import CompressionConfig
from lckv_megatron.measuring.timing import median_seconds, setting, write_csv
from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from tools.benchmarks.small_steps import own_step

MAPS = {"plain": CompressionConfig(), "lckv": CompressionConfig(layer_types="0_4_4_4_4_5")}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    initialize(parallel, seed=1)
    model = ModelConfig(
        num_layers=6, hidden_size=options.hidden_size, num_attention_heads=options.hidden_size // 64
    )
    build = partial(own_step, model, options.tokens, parallel)
    steps = {
        f"{name}, {'with' if sends else 'without'}": build(compression, sends_to_itself=sends)
        for name, compression in MAPS.items()
        for sends in (True, False)
    }
    measured = median_seconds(steps, repeats=options.repeats, warmup=2, clock="cpu")
    rows = []
    for name, seconds in measured.items():
        kind, _, collectives = name.partition(", ")
        before = measured[f"{kind}, with"]
        rows.append(
            {
                "map": kind,
                "collectives_of_one_data_parallel_rank": collectives,
                "cpu_milliseconds": round(1000 * seconds, 1),
                "ratio_to_with": round(seconds / before, 3),
                "tokens": options.tokens,
                "hidden_size": options.hidden_size,
                "ranks": dist.get_world_size(),
                **setting(device_of_rank().type),
            }
        )
    if dist.get_rank() == 0:
        for row in rows:
            print(*list(row.values())[:4], flush=True)
        if options.output:
            write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()
