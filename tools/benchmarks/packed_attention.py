"""Attention to documents of a row: all together, and one call of PyTorch's function for each of them.

    python -m tools.benchmarks.packed_attention --output tools/benchmarks/results/packed_attention.csv

Lengths of documents are of two kinds, in turns. Times are medians of rounds in which both take turns.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lckv.attention import sdpa
from lckv.attention.visibility import Documents, Visibility
from lckv_megatron.measuring.timing import median_seconds, setting
from tools.benchmarks.biased_attention import make_inputs, options, show_and_write


def documents_of(rows: int, length: int, count: int, device: torch.device) -> Documents | None:
    """`count` documents in each row, the first of a pair half as long as the second; None: whole rows."""
    if count == 1:
        return None
    pair = length // (count // 2)
    bounds = [start + shift for start in range(0, rows * length, pair) for shift in (0, pair // 3)]
    return Documents.at([*bounds, rows * length], device)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """A call for each document."""
    return torch.cat(
        [
            scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, start:stop],
                value[:, :, start:stop],
                is_causal=True,
                enable_gqa=True,
            )
            for _, start, stop in documents.spans(query.shape[2])
        ],
        2,
    )


def together(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """All documents at once."""
    scale = query.shape[-1] ** -0.5
    return sdpa.attend(query, key, value, Visibility(documents=documents), scale=scale)


def step(attend: Callable[..., Tensor], inputs: list[Tensor], documents: Documents) -> None:
    """Forward and backward."""
    torch.autograd.grad(attend(*inputs, documents).sum(), inputs)


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row per length and number of documents."""
    for length in args.lengths:
        dtype = getattr(torch, args.dtype)
        inputs = make_inputs(length, args.heads, args.kv_heads, args.head_dim, dtype, args.device)
        for count in args.documents:
            documents = documents_of(1, length, count, torch.device(args.device))
            assert documents is not None
            steps: dict[str, Callable[[], object]] = {
                attend.__name__: partial(step, attend, inputs, documents) for attend in (one_by_one, together)
            }
            seconds = median_seconds(steps, repeats=args.repeats, clock=args.clock)
            yield {
                "dtype": args.dtype,
                "length": length,
                "heads": args.heads,
                "kv_heads": args.kv_heads,
                "head_dim": args.head_dim,
                "documents": count,
                "clock": args.clock,
                "milliseconds_one_by_one": round(1e3 * seconds["one_by_one"], 2),
                "milliseconds_together": round(1e3 * seconds["together"], 2),
                "ratio": round(seconds["together"] / seconds["one_by_one"], 3),
                **setting(args.device),
            }


def main(argv: list[str] | None = None) -> None:
    """The program; see the module."""
    parser = options(str(__doc__))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="Tokens of a row.")
    parser.add_argument(
        "--documents", type=int, nargs="+", default=[2, 4, 16, 64], help="Documents of a row; even numbers."
    )
    shown = (
        "{length:>6} tokens  {documents:>3} documents  one by one {milliseconds_one_by_one:>8.1f} ms  "
        "together {milliseconds_together:>8.1f} ms  {ratio:>6.3f}x"
    )
    show_and_write(parser.parse_args(argv), measure, shown)


if __name__ == "__main__":
    main()
