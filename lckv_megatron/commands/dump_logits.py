"""Writes a checkpoint's logits for given tokens, for any outside program.

    torchrun --nproc-per-node 2 -m lckv_megatron dump-logits --load runs/demo/checkpoints \\
        --tokens tokens.npy --output logits.npy --tensor-model-parallel-size 2

Tokens are int64 [B, T] in numpy's format; logits are float32 [B, T, vocabulary], without padding of the
vocabulary. Rows are computed one by one (--rows-at-once for more) and written as they are done, so memory
does not grow with B. Data-parallel ranks share the rows; they must see the same file system.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lckv_megatron.checkpoint_options import add_layout_options, add_load_option, check_checkpoint, layout
from megatron_ext.arguments import ProgramParser
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.files import check_input, check_output


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ProgramParser("dump-logits", __doc__)
    add_load_option(parser)
    parser.add_argument("--tokens", type=Path, required=True, help="int64 [B, T] in numpy's .npy format")
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write, float32 [B, T, vocabulary]"
    )
    parser.add_argument("--rows-at-once", type=int, default=1, help="rows in memory at a time (default: 1)")
    add_layout_options(parser)
    options = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: dump(options))


def dump(options: argparse.Namespace) -> None:
    """torch and Megatron are loaded here, when logging is set up and the files are there."""
    check_output("--output", options.output)
    check_input("--tokens", options.tokens)
    check_checkpoint(options.load)
    from megatron_ext.evaluation.logits_file import dump_logits

    dump_logits(
        options.load,
        options.tokens,
        options.output,
        layout(options),
        options.rows_at_once,
        options.layer_types,
    )


if __name__ == "__main__":
    sys.exit(main())
