"""What a prompt costs whose last token alone has logits: layers above all keys and values run for that token.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.early_exit --clock cpu \\
        --output tools/benchmarks/results/early_exit.csv

Models of one size, with random weights, read a prompt of --length tokens in one piece into an empty cache, up
to the logits of its last token; with early exit, and with every layer for every token. Times are medians of
rounds in which all take turns; ratios are to the plain model, with early exit as all others have it. Maps
that iterate run all of --passes passes. Operations are counted by lckv/cost.py.
"""

import argparse
from collections.abc import Callable, Iterator

import torch

from lckv.sharing.early_exit import Results
from lckv_megatron.measuring.measures import Prefill
from lckv_megatron.measuring.operations import prefill_flops
from lckv_megatron.measuring.subjects import Subject, random_tokens
from lckv_megatron.measuring.timing import median_seconds, setting
from tools.benchmarks.biased_attention import options, show_and_write
from tools.benchmarks.generation.models import RandomModel, Sizes

MAPS = ("plain", "cla", "yoco", "lckv")
WAYS = {"early exit": Results.SOME, "all layers": Results.ALL}


def subjects(args: argparse.Namespace) -> list[Subject]:
    """A model for each map."""
    sizes = Sizes(
        args.layers,
        args.heads * args.head_dim,
        args.heads,
        args.kv_heads,
        args.vocab_size,
        args.sliding_window,
        args.length,
    )
    prompts = random_tokens(args.vocab_size, 1, args.length)
    made = []
    for name in args.maps:
        model = RandomModel.parse(name).build(
            sizes, dtype=getattr(torch, args.dtype), device=torch.device(args.device)
        )
        model.model.forward_passes, model.model.backward_passes = args.passes - 1, 1
        made.append(Subject(name, model, prompts))
    return made


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row per map and way."""
    models = subjects(args)
    calls: dict[tuple[str, str], Prefill] = {
        (subject.name, way): Prefill(subject, args.length, 0.0, results)
        for subject in models
        for way, results in WAYS.items()
    }
    timed: dict[str, Callable[[], object]] = {"/".join(key): call for key, call in calls.items()}
    seconds = median_seconds(timed, repeats=args.repeats, clock=args.clock)
    by_name = {subject.name: subject for subject in models}
    first = "/".join((models[0].name, "early exit"))
    baseline: float | None = None
    for (name, way), call in calls.items():
        config = by_name[name].model.config
        flops = prefill_flops(config, args.length, call.passes, WAYS[way])
        baseline = flops if baseline is None else baseline
        taken = seconds[f"{name}/{way}"]
        yield {
            "map": name,
            "layer_types": str(by_name[name].model.model.layer_types),
            "way": way,
            "length": args.length,
            "passes": call.passes,
            "milliseconds": round(1e3 * taken, 1),
            "ratio": round(taken / seconds[first], 3),
            "gflop": round(flops / 1e9, 2),
            "gflop_ratio": round(flops / baseline, 3),
            "heads": args.heads,
            "kv_heads": args.kv_heads,
            "head_dim": args.head_dim,
            "vocab_size": args.vocab_size,
            "dtype": args.dtype,
            "clock": args.clock,
            **setting(args.device),
        }


def main(argv: list[str] | None = None) -> None:
    """The program; see the module."""
    parser = options(str(__doc__))
    parser.set_defaults(heads=8, kv_heads=4, head_dim=32)
    parser.add_argument("--layers", type=int, default=22, help="Of each model.")
    parser.add_argument("--vocab-size", type=int, default=4096, help="Tokens that there are.")
    parser.add_argument("--sliding-window", type=int, default=256, help="Of layers that have one, in tokens.")
    parser.add_argument("--length", type=int, default=2048, help="Tokens of the prompt.")
    parser.add_argument("--maps", nargs="+", default=list(MAPS), help="The first is compared with.")
    parser.add_argument("--passes", type=int, default=3, help="Over iterated layers.")
    shown = (
        "{map:<8} {way:<10} {passes} passes {milliseconds:>9.1f} ms  {ratio:>6.3f}x  {gflop:>8.2f} GFLOP  "
        "{gflop_ratio:>6.3f}x"
    )
    show_and_write(parser.parse_args(argv), measure, shown)


if __name__ == "__main__":
    main()
