"""Measures the loss without logits (lckv/losses) against the plain one: time, and memory for larger
vocabularies.

    python -m tools.benchmarks.linear_cross_entropy --output tools/benchmarks/results/linear_cross_entropy.csv

seconds: forward and backward, median, in turns; CPU seconds on a CPU. time_ratio: to the plain loss, which
has the logits of all tokens. recomputing: the plain loss of a chunk at a time, whose logits are made again
in backward. peak_bytes: the most bytes alive at a time, beyond states, weight and targets; sums: the
gradient of the weight is added to sums that are there, as Megatron's data parallelism keeps them, which are
not in the peak either.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lckv.losses.linear_cross_entropy import linear_cross_entropy
from lckv_megatron.measuring.timing import median_seconds, peak_bytes, setting, write_csv

RECOMPUTED_TOKENS = 512


@dataclass(frozen=True)
class Inputs:
    """Of a loss."""

    states: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def of(cls, tokens: int, hidden_size: int, vocabulary: int, device: str) -> "Inputs":
        """Random ones of these sizes, float32."""
        states = torch.randn(tokens, hidden_size, device=device, requires_grad=True)
        weight = torch.randn(vocabulary, hidden_size, device=device).mul_(hidden_size**-0.5).requires_grad_()
        return cls(states, weight, torch.randint(vocabulary, (tokens,), device=device))

    def learn(self, total: Tensor) -> None:
        """Backward; gradients are dropped."""
        total.backward()
        self.states.grad = self.weight.grad = None


def plain(inputs: Inputs) -> None:
    """The logits of all tokens, then the loss."""
    inputs.learn(_whole(inputs.states, inputs.weight, inputs.targets))


def recomputing(inputs: Inputs) -> None:
    """The plain loss of some tokens at a time, again in backward."""
    parts = zip(inputs.states.split(RECOMPUTED_TOKENS), inputs.targets.split(RECOMPUTED_TOKENS), strict=True)
    losses = [
        checkpoint(_whole, states, inputs.weight, targets, use_reentrant=False) for states, targets in parts
    ]
    inputs.learn(torch.stack(losses).sum())


def without_logits(inputs: Inputs, *, chunk_size: int = 0, sums: Tensor | None = None) -> None:
    """This project's."""
    done = linear_cross_entropy(
        inputs.states, inputs.weight, inputs.targets, chunk_size=chunk_size, weight_gradient=sums
    )
    inputs.learn(done.total)


def _whole(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(torch.nn.functional.linear(states, weight), targets, reduction="sum")


def times(
    tokens: int, hidden_size: int, vocabulary: int, device: str, repeats: int
) -> Iterator[dict[str, object]]:
    """A row for each way."""
    inputs = Inputs.of(tokens, hidden_size, vocabulary, device)
    sums = torch.zeros_like(inputs.weight)
    ways: dict[str, Callable[[], None]] = {
        "plain": partial(plain, inputs),
        "recomputing": partial(recomputing, inputs),
        "without logits": partial(without_logits, inputs),
        "without logits, sums": partial(without_logits, inputs, sums=sums),
        "without logits, chunks of 256": partial(without_logits, inputs, chunk_size=256),
        "without logits, one chunk": partial(without_logits, inputs, chunk_size=tokens),
    }
    seconds = median_seconds(ways, repeats=repeats, clock="cpu" if device == "cpu" else "wall")
    for way, measured in seconds.items():
        row = {"loss": way, "tokens": tokens, "hidden_size": hidden_size, "vocabulary": vocabulary}
        ratio = f"{measured / seconds['plain']:.2f}"
        yield row | {"seconds": f"{measured:.4g}", "time_ratio": ratio, "peak_bytes": ""}


def peaks(tokens: int, hidden_size: int, vocabulary: int, device: str) -> Iterator[dict[str, object]]:
    """A row without and with sums."""
    inputs = Inputs.of(tokens, hidden_size, vocabulary, device)
    sums = torch.zeros_like(inputs.weight)
    for way, run in {
        "without logits": partial(without_logits, inputs),
        "without logits, sums": partial(without_logits, inputs, sums=sums),
    }.items():
        row = {"loss": way, "tokens": tokens, "hidden_size": hidden_size, "vocabulary": vocabulary}
        yield row | {"seconds": "", "time_ratio": "", "peak_bytes": peak_bytes(run)}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time-tokens", type=int, default=1024)
    parser.add_argument("--time-hidden-size", type=int, default=512)
    parser.add_argument("--time-vocabulary", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = options.time_tokens, options.time_hidden_size, options.time_vocabulary
    rows = [*times(*sizes, device, options.repeats)]
    for vocabulary in options.vocabularies:
        rows += peaks(options.tokens, options.hidden_size, vocabulary, device)
    rows = [row | setting(device) for row in rows]
    for row in rows:
        print("   ".join(f"{value!s:>15}" for value in row.values()), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()
