"""How long a step takes where two processes split a long sequence, compared with one process.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.context_parallel \\
        --output tools/benchmarks/results/context_parallel.csv

ratio: seconds on two processes (gloo), to seconds on one: at best 0.5. sent: by each process in a step, keys,
values and their gradients, as `lckv-megatron plan` says it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lckv_megatron.measuring.timing import setting, write_csv
from lckv_megatron.planning.context import sent_bytes
from lckv_megatron.planning.plan import Plan
from megatron_ext.command_line import parse_run_config
from tools.benchmarks import pipeline

RANKS = 2
CASES = (
    ("plain", "0_1_2_3", "gather"),
    ("plain", "0_1_2_3", "ring"),
    ("YOCO", "0s_1s_2_2", "gather"),
    ("LCKV", "0_2_2_3", "gather"),
)
"""Map, its layer types, and how keys and values get to the other process."""


def settings(layer_types: str, options: argparse.Namespace) -> list[str]:
    """Of a run on one process."""
    more = {
        "compression.sliding_window": options.window if "s" in layer_types else "null",
        "compression.forward_passes": 1,
        "compression.backward_passes": 1,
    }
    words = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    return [*pipeline.settings(layer_types, 1, options), *words]


def split(arguments: list[str], communication: str) -> list[str]:
    """The same on RANKS processes."""
    size, way = "--parallel.context_parallel_size", "--parallel.context_parallel_communication"
    return [*arguments, size, str(RANKS), way, communication]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    alone: dict[str, float] = {}
    for name, layer_types, communication in CASES:
        whole = settings(layer_types, options)
        if name not in alone:
            alone[name] = pipeline.seconds_of_step(whole, 1)
        arguments = split(whole, communication)
        seconds = pipeline.seconds_of_step(arguments, RANKS)
        run = parse_run_config(arguments)
        assert run.model.vocab_size is not None
        sent = sent_bytes(Plan(run, RANKS, run.model.vocab_size, utilisation=1.0), stage=0)
        yield {
            "map": name,
            "layer_types": layer_types,
            "communication": communication,
            "processes": RANKS,
            "seq_length": options.seq_length,
            "hidden_size": options.hidden_size,
            "seconds_one_process": round(alone[name], 3),
            "seconds": round(seconds, 3),
            "ratio": round(seconds / alone[name], 3),
            "sent_mebibytes": round(sent * options.micro_batches / 2**20, 2),
            **setting("cpu"),
        }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512, help="of YOCO's lower layers")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="the first one does not count")
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(argv)
    rows = []
    for row in measure(options):
        rows.append(row)
        print(row, flush=True)
    if options.output is not None:
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()
