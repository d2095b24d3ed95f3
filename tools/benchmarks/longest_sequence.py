"""The longest rows that fit into the GPUs of a recipe, for activations that stay, are recomputed, or go to
the host, by the dry run (docs/long_context.md).

    python -m tools.benchmarks.longest_sequence --output tools/benchmarks/results/longest_sequence.csv

A dry run of rows of --tokens tells what a rank holds besides its state, which grows with the length, and how
long a step takes, as a ratio to the one whose activations stay. From it follows the longest length, which is
dry run too, until it fits and no more than 3 % are left. The host's memory bounds it as well. Nothing runs on
a GPU, and nothing is measured: bytes are those of the storages that the program would make.
"""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.memory import Kind
from lckv_megatron.dry_run.rank import RankRun, simulate
from lckv_megatron.dry_run.report import step_seconds
from lckv_megatron.measuring.timing import setting, write_csv
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.model.fit import usable_bytes
from megatron_ext.model.offload_share import OffloadShare
from megatron_ext.offload.share import share_that_fits

MULTIPLE = 8192
"""Of tokens, to which lengths are rounded down."""
_LEFT, _TRIES = 0.03, 4
_FOLDER = Path("examples/long_context_7b")
_MAPS = {"plain": ["pretrain.yaml"], "YOCO": ["pretrain.yaml", "yoco.yaml"]}
_STATE: tuple[Kind, ...] = ("parameters", "gradients", "optimizer")


def ways(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """The run with all that activations can do; the first is the measure of time."""
    stay = replace(run.train, activation_offload="none")
    yield "none", replace(run, train=stay)
    yield "full recompute", replace(run, train=replace(stay, recompute_granularity="full"))
    yield "token-wise swap", run


def dry_run(run: RunConfig, tokens: int) -> RankRun:
    """Of rows of so many tokens, one a step."""
    train = replace(run.train, seq_length=tokens, micro_batch_size=1, global_batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron tells what is not installed
        return simulate(
            replace(run, train=train),
            rank=0,
            world_size=run.parallel.replica_size,
            vocab_size=run.model.vocab_size or 0,
            machine=Machine(),
        )


def longest(
    run: RunConfig, first: RankRun, tokens: int, usable: int, *, multiple: int = MULTIPLE
) -> tuple[int, RankRun]:
    """The longest rows with which a rank needs at most `usable` bytes, and their dry run; `first` is that of
    rows of `tokens`.

    Raises ValueError where none is found.
    """
    result, best = first, None
    for _ in range(_TRIES):
        state = sum(result.memory.peak[kind] for kind in _STATE)
        room = (usable - state) / (result.memory.peak_bytes - state)
        if room >= 1:
            best = tokens, result
        following = int(min(tokens * room, _host_limit(run)) / multiple) * multiple
        if following == tokens or 1 <= room < 1 + _LEFT or following <= 0:
            break
        tokens, result = following, dry_run(run, following)
    if best is None:
        raise ValueError(
            f"no rows of a multiple of {multiple} tokens were found that fit into {usable} bytes"
        )
    return best


def _host_limit(run: RunConfig) -> float:
    """Tokens of a row with which the host's memory is full of what always goes there."""
    if run.train.activation_offload == "none":
        return float("inf")
    train = replace(run.train, micro_batch_size=1, global_batch_size=1)
    share = OffloadShare.of(replace(run, train=train), vocab_size=run.model.vocab_size or 0)
    low, high = 0, 2**30
    while high - low > 1:  # what a token takes hardly depends on the length
        middle = (low + high) // 2
        fits = share_that_fits(share.loads, middle, share.usable_bytes) >= 0
        low, high = (middle, high) if fits else (low, middle)
    return low * run.parallel.context_parallel_size


def measure(name: str, run: RunConfig, tokens: int, usable: int) -> Iterator[dict[str, object]]:
    """A row for each way."""
    stages = run.parallel.pipeline_model_parallel_size
    seconds = None
    for activations, changed in ways(run):
        first = dry_run(changed, tokens)
        seconds = step_seconds(first, stages) if seconds is None else seconds
        most, result = longest(changed, first, tokens, usable)
        host = result.host
        yield {
            "map": name,
            "activations": activations,
            "longest_tokens": most,
            "peak_gib": round(result.memory.peak_bytes / 2**30, 2),
            "host_gib": 0 if host is None else round(host.pool_bytes / 2**30),
            "share": "" if host is None else round(host.share, 3),
            "time_ratio": round(step_seconds(first, stages) / seconds, 3),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1048576, help="of the rows of which times are compared")
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    machine, rows = Machine(), []
    usable = usable_bytes(machine.gpu.memory_bytes)
    for name, files in _MAPS.items():
        run = parse_run_config([f"--config={_FOLDER / file}" for file in files])
        sizes = {"tokens": options.tokens, "usable_gib": round(usable / 2**30, 2), "gpu": machine.gpu.name}
        for row in measure(name, run, options.tokens, usable):
            rows.append(row | sizes | setting("cpu"))
            print("   ".join(f"{value:>15}" for value in row.values()), flush=True)
    if options.output:
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()
