"""Converts models between Hugging Face and Megatron, proven by their logits.

    lckv-megatron convert hf-to-megatron --hf-path meta-llama/Llama-2-7b-hf --megatron-path ckpt/plain
    lckv-megatron convert megatron-to-hf --megatron-path runs/mine/checkpoints --hf-path out/model

The same as python -m checkpoints_conversion, whose options and help it has.
"""

import sys
from collections.abc import Sequence

from checkpoints_conversion.__main__ import main as convert


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    return convert(argv, prog="lckv-megatron convert")


if __name__ == "__main__":
    sys.exit(main())
