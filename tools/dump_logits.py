"""Writes a trained model's logits for given tokens, so that any outside program can compare it.

    torchrun --nproc-per-node 2 tools/dump_logits.py --load runs/demo/checkpoints --tokens tokens.npy --output
    logits.npy \\
        --tensor_model_parallel_size 2

Tokens are int64 [B, T] in numpy's format; logits are float32 [B, T, vocabulary], without padding of the
vocabulary. Rows are computed one by one (--rows_at_once for more) and written as they are done, so memory
does not grow with B. Data-parallel ranks share the rows; they must see the same file system.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config import ParallelConfig
from megatron_ext.console import exit_status, set_up_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load", type=Path, required=True, help="directory of checkpoints, or one checkpoint"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="int64 [B, T] in numpy's .npy format")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write, float32 [B, T, vocabulary]"
    )
    parser.add_argument("--rows_at_once", type=int, default=1, help="rows in memory at a time (default: 1)")
    parser.add_argument(
        "--tensor_model_parallel_size", type=int, default=1, help="as in training (default: 1)"
    )
    parser.add_argument(
        "--pipeline_model_parallel_size", type=int, default=1, help="as in training (default: 1)"
    )
    options = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: dump(options))


def dump(options: argparse.Namespace) -> None:
    """torch and Megatron are loaded here, when logging is set up."""
    from megatron_ext.evaluation.logits_file import dump_logits

    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    dump_logits(options.load, options.tokens, options.output, parallel, options.rows_at_once)


if __name__ == "__main__":
    sys.exit(main())
