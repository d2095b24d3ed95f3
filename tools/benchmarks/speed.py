"""Measures what the README's speed table says, one benchmark after the other, and prints the table.

    python -m tools.benchmarks.speed                  # all of them, then the table: `make bench`
    python -m tools.benchmarks.speed early_exit       # some of them
    python -m tools.benchmarks.speed --table          # the table of the rows that are there

Each benchmark is a process of its own with one thread, and writes its rows into --results. Ratios are within
one benchmark, whose subjects take turns.
"""

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ARGUMENTS = {
    "training_step": ("--clock", "cpu"),
    "small_steps": (),
    "pipeline": (),
    "linear_cross_entropy": (),
    "biased_attention": ("--clock", "cpu"),
    "partial_attention": ("--clock", "cpu"),
    "packed_attention": ("--clock", "cpu"),
    "early_exit": ("--clock", "cpu"),
    "continued_prompts": (),
    "decode_step": (),
    "speculation": ("--clock", "cpu"),
    "checkpoints": (),
    "conversion_memory": (),
    "blends": (),
}
"""Each benchmark of the table, and what it is given beside --output."""

_SAME_PRODUCTS = "1x: same products"

HEAD = ("what", "this project", "to", "limit", "rows")
"""`limit`: what the ratio could be at best, or has to be at most, and why."""

Row = dict[str, str]


@dataclass(frozen=True)
class Rows:
    """Those of one benchmark."""

    name: str
    rows: list[Row]

    def value(self, column: str, **where: str) -> float:
        """Of the only row with these values. Raises ValueError where there is none, or are several."""
        (row,) = (row for row in self.rows if all(row[key] == wanted for key, wanted in where.items()))
        return float(row[column])

    def names(self, column: str, beginning: str) -> list[str]:
        """Values that begin so."""
        return [row[column] for row in self.rows if row[column].startswith(beginning)]

    def ratios(self, column: str, key: str, *values: str, **where: str) -> str:
        """As "1.06x, 1.02x", of the rows in which `key` has these values."""
        return ", ".join(times(self.value(column, **{key: value}, **where)) for value in values)


def times(ratio: float) -> str:
    """As text."""
    return f"{ratio:.2f}x"


Load = Callable[[str], Rows]
Line = tuple[str, str, str, str, str]
"""What; the ratio; whose; its limit; the benchmark."""


def training(load: Load) -> Iterator[Line]:
    """Steps of training."""
    steps = load("training_step")
    plain = 1 / steps.value("ratio_to_plain", model="megatron GPTModel")
    yield (
        "step of a plain map",
        times(plain),
        "Megatron's GPTModel, local spec",
        _SAME_PRODUCTS,
        steps.name,
    )
    for model, title in (
        ("lckv", "LCKV, w = 2, m = 7, b = 2, 8 layers"),
        ("lckv m3 b1", "the same, m = 3, b = 1"),
        ("lckv m1 b1 guess", "the same, m = 1, b = 1, with a first guess"),
        ("sandwich-middle", "sandwich-middle, m = 7, b = 2"),
        ("cla", "CLA"),
        ("yoco", "YOCO"),
        *(
            (name, name.removeprefix("plain x ").partition(":")[0].upper())
            for name in steps.names("model", "plain x ")
        ),
    ):
        ratio, least = (steps.value(column, model=model) for column in ("ratio_to_plain", "predicted_ratio"))
        yield f"step of {title}", times(ratio), "plain map", f"{times(least)}: operations", steps.name
    small = load("small_steps")
    lengths = ("128", "512", "2048")
    ratios = small.ratios("ratio_to_transformers", "tokens", *lengths, step="this project")
    peer = "transformers' Llama, torch's fused AdamW"
    yield "whole step of 128, 512, 2,048 tokens, width 512", ratios, peer, _SAME_PRODUCTS, small.name
    loss = load("linear_cross_entropy")
    ratio = loss.value("time_ratio", loss="without logits", tokens="1024")
    yield "loss without logits, vocabulary 32,768", times(ratio), "plain loss", _SAME_PRODUCTS, loss.name
    again = loss.value("time_ratio", loss="recomputing")
    yield (
        "loss with logits made again in backward",
        times(again),
        "plain loss",
        "1.33x: 4 products for 3",
        loss.name,
    )
    sizes = [
        loss.value("peak_bytes", loss="without logits", vocabulary=vocabulary, tokens="8192") / 2**20
        for vocabulary in ("32768", "131072", "262144")
    ]
    memory = ", ".join(f"{size:.0f}" for size in sizes) + " MiB"
    title = "memory of the loss, vocabulary 32k, 128k, 256k, 8,192 tokens"
    yield title, memory, "inputs", "250 MB beside them", loss.name


def parallel(load: Load) -> Iterator[Line]:
    """Steps on two processes."""
    stages = load("pipeline")
    for name in ("LCKV, w = 2", "plain"):
        ratio, least = (stages.value(column, map=name) for column in ("ratio", "predicted_ratio"))
        limit = f"{times(least)}: half, and the bubble"
        yield f"{name}: two pipeline stages, 8 micro-batches", times(ratio), "one process", limit, stages.name


def attention(load: Load) -> Iterator[Line]:
    """Forward and backward of attention."""
    biased = load("biased_attention")
    for variant, title, limit in (
        ("frontier", "attention over merged keys, 2,048 tokens", _SAME_PRODUCTS),
        ("dense_bias", "the same with a bias matrix", _SAME_PRODUCTS),
    ):
        ratio = biased.value("ratio_to_plain", variant=variant, length="2048")
        yield title, times(ratio), "causal attention", limit, biased.name
    partial = load("partial_attention")
    for keys, title in (("dense", "8,192 tokens in 2, 4 chunks of queries"), ("biased", "over merged keys")):
        ratios = partial.ratios("ratio_to_whole", "chunks", "2", "4", keys=keys)
        yield f"attention, {title}", ratios, "whole rows", _SAME_PRODUCTS, partial.name
    packed = load("packed_attention")
    ratios = packed.ratios("ratio", "documents", "2", "4", "16", "64", length="2048")
    title = "attention of 2, 4, 16, 64 documents in one call, 2,048 tokens"
    yield title, ratios, "one call per document", _SAME_PRODUCTS, packed.name


def inference(load: Load) -> Iterator[Line]:
    """Prompts."""
    exits = load("early_exit")
    for name, title in (("cla", "CLA"), ("yoco", "YOCO"), ("lckv", "LCKV, w = 2, 3 passes")):
        ratio, least = (
            exits.value(column, map=name, way="early exit") for column in ("ratio", "gflop_ratio")
        )
        yield (
            f"prompt of 2,048 tokens, {title}",
            times(ratio),
            "plain map",
            f"{times(least)}: operations",
            exits.name,
        )
    more = load("continued_prompts")
    for model, title in (("this project", "Hugging Face model"), ("this project's engine", "engine")):
        ratios = more.ratios("ratio_to_transformers", "past_tokens", "2048", "8192", "16384", model=model)
        title = f"512 tokens behind 2,048, 8,192, 16,384 in the cache, {title}"
        yield title, ratios, "transformers' Llama", _SAME_PRODUCTS, more.name


def decoding(load: Load) -> Iterator[Line]:
    """Steps of decoding."""
    steps = load("decode_step")
    few = [
        {"hidden_size": size, "rows": rows, "tokens": "128"} for size in ("64", "256") for rows in ("1", "8")
    ]
    many = [{"hidden_size": "256", "rows": rows, "tokens": "2048"} for rows in ("1", "8")]
    for step, how in (
        ("contiguous", "Hugging Face model and its cache"),
        ("paged", "on pages"),
        ("engine", "all of the engine's step"),
    ):
        for sizes, of in (
            (few, "width 64, 256, each with 1, 8 rows"),
            (many, "1, 8 rows behind 2,048 tokens"),
        ):
            values = (steps.value("ratio_to_transformers", step=step, **size) for size in sizes)
            title = f"decoding step of {of}: {how}"
            yield title, ", ".join(map(times, values)), "transformers' Llama", _SAME_PRODUCTS, steps.name
    guessed = load("speculation")
    for text, meaning in (("edit", "repeats its prompt"), ("article", "does not repeat its prompt")):
        where = {"map": "plain", "text": text, "speculation_tokens": "8"}
        title = f"answer that {meaning}, 8 tokens guessed by prompt lookup"
        tokens = guessed.value("tokens_per_step", **where)
        limit = f"{1 / tokens:.2f}x: {tokens:g} tokens a step"
        yield title, times(guessed.value("ratio", **where)), "no guesses", limit, guessed.name


def files(load: Load) -> Iterator[Line]:
    """Checkpoints, conversions, datasets."""
    saved = load("checkpoints")
    for way, peer in (("save", "torch.save and a hash"), ("load", "torch.load and a hash")):
        ratios = saved.ratios("ratio_to_torch", "ranks", "1", "2", way=way, precision="fp32")
        size = saved.value("state_bytes", ranks="1", way=way, precision="fp32") / 1e6
        yield f"{way} of {size:.0f} MB, on one rank, on two", ratios, peer, "1x: same bytes", saved.name
    converted = load("conversion_memory")
    sizes = {
        width: max(int(row["model_bytes"]) for row in converted.rows if row["hidden_size"] == width)
        for width in ("512", "2048")
    }
    for way in ("hf-to-megatron", "hf-to-megatron, averaged map", "megatron-to-hf"):
        ratios = ", ".join(
            times(converted.value("ratio_to_copy", conversion=way, model_bytes=str(size), hidden_size=width))
            for width, size in sizes.items()
        )
        megabytes = ", ".join(f"{size / 1e6:,.0f}" for size in sizes.values())
        title = f"{way}, {megabytes} MB, width 512, 2,048"
        yield title, ratios, "a copy and a hash", "1.5x: two hashes, one copy", converted.name
    blends = load("blends")
    ratios = ", ".join(
        times(
            blends.value("cpu_seconds", datasets=number, build="this project")
            / blends.value("cpu_seconds", datasets=number, build="megatron")
        )
        for number in ("300", "1500")
    )
    title = "first build of a blend of 300, 1,500 datasets, at most 512 open files"
    yield title, ratios, "Megatron's builder, all open", "1x: same indices", blends.name


def table(results: Path) -> list[str]:
    """The README's lines. Raises OSError where a benchmark has no rows."""

    def load(name: str) -> Rows:
        with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            return Rows(name, list(csv.DictReader(file)))

    lines = [HEAD, ("---",) * len(HEAD)]
    for part in (training, parallel, attention, inference, decoding, files):
        for *cells, name in part(load):
            lines.append((*cells, f"[{name}](tools/benchmarks/results/{name}.csv)"))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def run(name: str, results: Path) -> int:
    """Measure; the exit status."""
    command = [sys.executable, "-m", f"tools.benchmarks.{name}", *ARGUMENTS[name]]
    threads = {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--output", str(results / f"{name}.csv")], env=os.environ | threads, check=False
    ).returncode


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *ARGUMENTS], help="default: all", metavar="NAME")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the rows are (default: this project's)"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    options.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in () if options.table else options.names or ARGUMENTS:
        print(f"== {name}", flush=True)
        if run(name, options.results):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    if options.table or not options.names:
        print(*table(options.results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
