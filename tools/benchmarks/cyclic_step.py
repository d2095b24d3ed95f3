"""Times one training step (forward and backward) of a cyclic map with different passes against a plain model,
in one run, by the CPU's clock.

    python -m tools.benchmarks.cyclic_step --output tools/benchmarks/results/cyclic_step.csv

Each measured ratio stands beside the one that operations predict (lckv/cost.py).
"""

import argparse
from pathlib import Path

import torch

from lckv.config import CompressionConfig
from lckv.cost import training_cost
from megatron_ext.config import ParallelConfig
from megatron_ext.model.cost import model_shape
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from tools.benchmarks.timing import median_seconds, setting, write_csv
from tools.benchmarks.training_step import Sizes, shared_step

PASSES = (
    (7, 2, False), (3, 1, False), (2, 1, False), (1, 2, False), (1, 1, False), (1, 2, True), (1, 1, True),
    (0, 1, True),
)  # fmt: skip
"""m, b, and whether there is a first guess."""


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layer-types", default="0_6_6_6_6_6_6_7", help="eight layers; LCKV with w = 2")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    sizes = Sizes(options.hidden_size, 4, 2, 1024, options.seq_length, 2, "fp32")
    compressions = {
        f"m {m}, b {b}{', first guess' if guess else ''}": CompressionConfig(
            layer_types=options.layer_types, forward_passes=m, backward_passes=b, first_guess=guess
        )
        for m, b, guess in PASSES
    }
    compressions = {"plain": CompressionConfig()} | compressions
    initialize(ParallelConfig(), seed=1)
    tokens = torch.randint(sizes.vocab_size, (2, sizes.seq_length), device=device_of_rank())
    steps = {name: shared_step(sizes, compression, tokens) for name, compression in compressions.items()}
    measured = median_seconds(steps, repeats=options.repeats, clock="cpu")
    shape = model_shape(sizes.model, vocab_size=sizes.vocab_size, seq_length=sizes.seq_length)
    rows = []
    for name, seconds in measured.items():
        ratio = seconds / measured["plain"]
        predicted = training_cost(shape, compressions[name]).ratio
        rows.append(
            {
                "passes": name,
                "layer_types": compressions[name].layer_types or "",
                "cpu_milliseconds": round(1000 * seconds, 1),
                "ratio_to_plain": round(ratio, 3),
                "predicted_ratio": round(predicted, 3),
                "hidden_size": sizes.hidden_size,
                "tokens": f"2x{sizes.seq_length}",
                **setting(device_of_rank().type),
            }
        )
        print(f"{name:<24} {1000 * seconds:9.1f} ms   {ratio:5.2f}x plain, predicted {predicted:5.2f}x")
    if options.output:
        write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()
