"""Operators and CPU time of a layer in a training step, for what its attention sees: plain, excluded self,
documents, KV policies, and Megatron's own GPTModel beside them.

    python -m tools.benchmarks.step_profile --output tools/benchmarks/results/step_profile.csv

A layer is the difference between models of four and of two layers, forward and backward. Counted by
torch.profiler: kernels are operators that make or change tensors and call no other operator, so views are not
among them; copies are those of them that only move, fill or join. On a GPU each kernel is about one launch.
Times are medians of rounds in which all kinds take turns.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lckv.config import CompressionConfig
from lckv_megatron.measuring.timing import CLOCKS, median_seconds, setting, write_csv
from megatron_ext.config import ParallelConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.policy_statistics import PolicyInputs
from megatron_ext.parallel.process_groups import destroy, device_of_rank, initialize
from tools.benchmarks.operators import ATTENTION, kernels_of
from tools.benchmarks.packed_attention import documents_of
from tools.benchmarks.policies import merging_policies, policy_of
from tools.benchmarks.training_step import Sizes, megatron_step

COPIES = {
    "copy_", "cat", "fill_", "zero_", "constant_pad_nd", "index_select", "index", "_index_put_impl_",
    "flip", "clone", "stack", "index_copy_", "index_fill_",
}  # fmt: skip
"""Operators that compute nothing."""
MEGATRON = "megatron GPTModel"


@dataclass(frozen=True)
class Kind:
    """What is profiled."""

    compression: CompressionConfig
    documents: int = 1
    """In each row, of lengths that differ where there are several."""


def kinds() -> dict[str, Kind]:
    """By name."""
    plain, blind = CompressionConfig(), CompressionConfig(force_nodiag=True)
    compressions = {"plain": plain, "excluded self": blind}
    policies = {name: policy_of(text) for name, text in merging_policies().items()}
    compressions |= {name: CompressionConfig(policy=policy) for name, policy in policies.items()}
    return {
        f"{name}, {documents} documents" if documents > 1 else name: Kind(compression, documents)
        for name, compression in compressions.items()
        for documents in (1, 4, 64)
    }


def step_of(sizes: Sizes, kind: Kind, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of this project's model."""
    model = build_stage(
        sizes.model, kind.compression, ParallelConfig(), sizes.train, vocab_size=sizes.vocab_size
    )
    rows, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    policy = PolicyInputs(row_seeds=tuple(range(rows)), progress=0.5)

    def step() -> None:
        # made anew in each micro-batch, as in training
        documents = documents_of(rows, length, kind.documents, tokens.device)
        losses, report = model(tokens, positions, tokens, documents, policy)
        auxiliary = 0.0 if report.auxiliary_loss is None else report.auxiliary_loss.mean()
        (losses.total + auxiliary).backward()

    return step


def layer_kernels(make: Callable[[Sizes], Callable[[], None]], sizes: Sizes) -> Counter[str]:
    """Those of one layer, from models of four and two."""
    four, two = (kernels_of(make(sizes.with_layers(layers))) for layers in (4, 2))
    return Counter({name: (four[name] - two[name]) / 2 for name in four if four[name] != two[name]})


def _seconds(
    makes: Mapping[str, Callable[[Sizes], Callable[[], None]]], sizes: Sizes, repeats: int, clock: str
) -> dict[str, float]:
    """Of a layer."""
    steps = {
        f"{layers} {name}": make(sizes.with_layers(layers))
        for name, make in makes.items()
        for layers in (4, 2)
    }
    seconds = median_seconds(steps, repeats=repeats, clock=clock)
    return {name: (seconds[f"4 {name}"] - seconds[f"2 {name}"]) / 2 for name in makes}


def measure(sizes: Sizes, repeats: int, clock: str) -> Iterator[dict[str, object]]:
    """A row per kind."""
    tokens = torch.randint(
        sizes.vocab_size, (sizes.micro_batch_size, sizes.seq_length), device=device_of_rank()
    )
    makes: dict[str, Callable[[Sizes], Callable[[], None]]] = {
        MEGATRON: partial(megatron_step, tokens=tokens)
    }
    makes |= {name: partial(step_of, kind=kind, tokens=tokens) for name, kind in kinds().items()}
    seconds = _seconds(makes, sizes, repeats, clock) if repeats else {}
    for name, make in makes.items():
        counted = layer_kernels(make, sizes)
        yield {
            "kind": name,
            "kernels": round(counted.total()),
            "copies": round(sum(counted[copy] for copy in COPIES)),
            "attention": round(sum(counted[name] for name in counted if name.endswith(ATTENTION))),
            "milliseconds": round(1e3 * seconds[name], 2) if repeats else "",
            "clock": clock,
            "tokens": f"{sizes.micro_batch_size}x{sizes.seq_length}",
            **setting(device_of_rank().type),
            "tree": "now",
        }


def main(argv: list[str] | None = None) -> None:
    """The program; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-length", type=int, default=2048, help="Tokens of a row.")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="Rows.")
    parser.add_argument("--hidden-size", type=int, default=512, help="Channels; heads have 64.")
    parser.add_argument("--repeats", type=int, default=3, help="Rounds; 0: no times, only counts.")
    parser.add_argument("--clock", default="cpu", choices=list(CLOCKS), help="cpu: for a busy machine.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument(
        "--before", type=Path, help="Rows that this program wrote in another tree, to stand in front."
    )
    parser.add_argument("--output", type=Path, help="CSV file to write.")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    heads = options.hidden_size // 64
    sizes = Sizes(
        options.hidden_size, heads, heads // 2, 512, options.seq_length, options.micro_batch_size, "fp32"
    )
    initialize(ParallelConfig(), seed=1)
    rows: list[dict[str, object]] = []
    for row in measure(sizes, options.repeats, options.clock):
        rows.append(row)
        print(
            "{kind:<28} {kernels:>6} kernels  {copies:>5} copies  {attention:>4} of attention  "
            "{milliseconds:>8} ms".format_map(row),
            flush=True,
        )
    if options.before is not None:
        with options.before.open(newline="", encoding="utf-8") as file:
            rows = [{**row, "tree": "before"} for row in csv.DictReader(file)] + rows
    if options.output is not None:
        write_csv(options.output, rows)
    destroy()


if __name__ == "__main__":
    main()
