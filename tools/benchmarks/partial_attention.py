"""Attention of a row in chunks of queries, as context parallelism cuts it, and of the row as a whole: forward
and backward, of ordinary keys and of keys with a bias.

    python -m tools.benchmarks.partial_attention --output tools/benchmarks/results/partial_attention.csv

Each chunk attends to all keys up to its end: 2 c chunks are the work of c ranks. Times are medians of rounds
in which all take turns; ratios are to the whole row in the same rounds. Bytes are the most that is alive at
once during forward and backward, inputs not counted.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lckv.attention import sdpa
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv_megatron.measuring.timing import median_seconds, peak_bytes, setting
from tools.benchmarks.biased_attention import make_inputs, options, show_and_write

KEYS = {"dense": None, "biased": KeyBias()}


def attend(inputs: list[Tensor], chunks: int, key_bias: KeyBias | None) -> Tensor:
    """Output [b, h, s, d] in the order of the row."""
    query, key, value = inputs
    scale, starts = query.shape[-1] ** -0.5, range(0, query.shape[2], query.shape[2] // chunks)
    outputs = []
    for start, queries in zip(starts, query.chunk(chunks, 2), strict=True):
        stop = start + queries.shape[2]
        keys = key[:, :, :stop], value[:, :, :stop]
        outputs.append(sdpa.attend(queries, *keys, Visibility(), scale=scale, key_bias=key_bias))
    return torch.cat(outputs, 2)


def step(inputs: list[Tensor], gradient: Tensor, chunks: int, key_bias: KeyBias | None) -> None:
    """Forward and backward."""
    torch.autograd.grad(attend(inputs, chunks, key_bias), inputs, gradient)


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row per kind of keys and number of chunks."""
    dtype = getattr(torch, args.dtype)
    inputs = make_inputs(args.length, args.heads, args.kv_heads, args.head_dim, dtype, args.device)
    gradient = torch.randn_like(inputs[0])
    for name, key_bias in KEYS.items():
        steps: dict[str, Callable[[], None]] = {
            str(chunks): partial(step, inputs, gradient, chunks, key_bias) for chunks in (1, *args.chunks)
        }
        seconds = median_seconds(steps, repeats=args.repeats, clock=args.clock)
        for chunks in steps:
            yield {
                "dtype": args.dtype,
                "length": args.length,
                "heads": args.heads,
                "kv_heads": args.kv_heads,
                "head_dim": args.head_dim,
                "keys": name,
                "chunks": chunks,
                "clock": args.clock,
                "milliseconds": round(1e3 * seconds[chunks], 2),
                "ratio_to_whole": round(seconds[chunks] / seconds["1"], 3),
                "peak_mebibytes": round(peak_bytes(steps[chunks]) / 2**20, 2),
                **setting(args.device),
            }


def main(argv: list[str] | None = None) -> None:
    """The program; see the module."""
    parser = options(str(__doc__))
    parser.add_argument("--length", type=int, default=8192, help="Tokens of a row; a multiple of all chunks.")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4], help="Chunks of a row.")
    shown = (
        "{keys:<7} {chunks:>3} chunks {milliseconds:>9.1f} ms  {ratio_to_whole:>6.3f}x  "
        "{peak_mebibytes:>8.1f} MiB"
    )
    show_and_write(parser.parse_args(argv), measure, shown)


if __name__ == "__main__":
    main()
