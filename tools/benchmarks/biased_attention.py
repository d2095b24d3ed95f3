"""Attention with a bias per key: plain causal attention, the frontier decomposition and a dense bias, forward
and backward.

    python -m tools.benchmarks.biased_attention --output tools/benchmarks/results/biased_attention.csv

Times are medians of rounds in which the three take turns; ratios are to plain causal attention in the same
rounds. Bytes are the most that is alive at once during forward and backward, inputs not counted.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from lckv.attention import sdpa
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv_megatron.measuring.timing import CLOCKS, median_seconds, peak_bytes, setting, write_csv

VARIANTS = ("plain", "frontier", "dense_bias")


def make_inputs(
    length: int, heads: int, kv_heads: int, channels: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Query, key, value [1, heads, s, d], laid out as in the model, with bias channels."""
    shapes = ((length, 1, count, channels) for count in (heads, kv_heads, kv_heads))
    query, key, value = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    query[..., -1], key[..., -1] = channels**0.5, logsigmoid(5 * torch.randn_like(key[..., -1]))
    return [tensor.permute(1, 2, 0, 3).requires_grad_() for tensor in (query, key, value)]


def attend(variant: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One variant's forward."""
    length, scale, grouped = query.shape[2], query.shape[-1] ** -0.5, query.shape[1] != key.shape[1]
    if variant == "plain":
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
    if variant == "frontier":
        return sdpa.attend(query, key, value, Visibility(), scale=scale, key_bias=KeyBias())
    # What the public code does: a bias of length x length that takes the key's bias back on the diagonal.
    future = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    back = torch.diag_embed(-key[..., -1]).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=back + future, scale=scale, enable_gqa=grouped
    )


def step(variant: str, inputs: list[Tensor], gradient: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(attend(variant, *inputs), inputs, gradient)


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row per length and variant."""
    for length in args.lengths:
        inputs = make_inputs(
            length, args.heads, args.kv_heads, args.head_dim, getattr(torch, args.dtype), args.device
        )
        gradient = torch.randn_like(inputs[0])
        variants = [name for name in VARIANTS if name != "dense_bias" or length <= args.dense_up_to]
        steps: dict[str, Callable[[], None]] = {
            name: partial(step, name, inputs, gradient) for name in variants
        }
        seconds = median_seconds(steps, repeats=args.repeats, clock=args.clock)
        for name in variants:
            yield {
                "dtype": args.dtype,
                "length": length,
                "heads": args.heads,
                "kv_heads": args.kv_heads,
                "head_dim": args.head_dim,
                "variant": name,
                "clock": args.clock,
                "milliseconds": round(1e3 * seconds[name], 2),
                "ratio_to_plain": round(seconds[name] / seconds["plain"], 3),
                "peak_mebibytes": round(peak_bytes(steps[name]) / 2**20, 2),
                **setting(args.device),
            }


def options(description: str) -> argparse.ArgumentParser:
    """Options of benchmarks of attention."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=8, help="Query heads.")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads.")
    parser.add_argument("--head-dim", type=int, default=64, help="Channels of a head.")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Of the inputs."
    )
    parser.add_argument("--repeats", type=int, default=5, help="Rounds.")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: on a busy machine, with one thread."
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    parser.add_argument("--output", type=Path, help="CSV file to write.")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda."
    )
    return parser


def show_and_write(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Iterator[dict[str, object]]],
    shown: str,
) -> None:
    """Print each row as the format `shown` when it is measured; write them where `args` say."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for row in measure(args):
        rows.append(row)
        print(shown.format(**row), flush=True)
    if args.output is not None:
        write_csv(args.output, rows)


def main(argv: list[str] | None = None) -> None:
    """The program; see the module."""
    parser = options(str(__doc__))
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="Tokens per row."
    )
    parser.add_argument(
        "--dense-up-to", type=int, default=4096, help="Longest rows with a dense bias, which takes gigabytes."
    )
    shown = (
        "{length:>6} tokens  {variant:<10} {milliseconds:>9.1f} ms  {ratio_to_plain:>6.3f}x  "
        "{peak_mebibytes:>8.1f} MiB"
    )
    show_and_write(parser.parse_args(argv), measure, shown)


if __name__ == "__main__":
    main()
