"""Trains small models with iterated maps in cheaper ways, and measures what of their quality is lost.

    python -m tools.benchmarks.cyclic_training --text wiki.test.txt wiki.valid.txt \
        --output tools/benchmarks/results/cyclic_training.csv

Each cell of the grid is a model that is trained on the bytes of the texts, all in the same order for one
seed, and measured on their end. Its row is appended to the file as soon as it is done; a cell whose row is
there is skipped, so that the command can be given again. A loss is a mean over bytes, in nats. `exact` runs
passes until the shared keys and values settle, which is what decoding token by token gives.

    python -m tools.benchmarks.cyclic_training --table tools/benchmarks/results/cyclic_training.csv

prints the rows as a table, cells with several seeds as their means.
"""

import argparse
import csv
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from lckv_megatron.measuring.timing import setting
from tools.benchmarks.cyclic.grid import SEEDS, Cell, Sizes, grid
from tools.benchmarks.cyclic.models import trained
from tools.benchmarks.cyclic.table import table


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", type=Path, metavar="CSV", help="print the rows of a file, and train nothing"
    )
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on")
    parser.add_argument("--output", type=Path, help="CSV file, which rows are appended to")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=1, help="texts of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=192, help="bytes of each (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="the highest (default: %(default)s)"
    )
    parser.add_argument("--cells", type=int, help="train at most so many now (default: all that are left)")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="train cells of this seed alone")
    parser.add_argument("--held-out", type=int, default=48, help="texts to measure (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.table is not None:
        print("\n".join(table(options.table)))
        return
    if options.text is None or options.output is None:
        parser.error("--text and --output are needed, or --table")
    sizes = Sizes(options.steps, options.hidden_size, options.rows, options.length, options.learning_rate)
    everything = b"".join(path.read_bytes() for path in options.text)
    tokens = torch.frombuffer(bytearray(everything), dtype=torch.uint8).long()
    held_out = options.held_out * options.length
    wanted = (
        cell
        for cell in grid(sizes)
        if options.seed in (None, cell.seed) and not _is_there(options.output, _key(cell, sizes))
    )
    for cell in islice(wanted, options.cells):
        measured = trained(cell, sizes, tokens[:-held_out], tokens[-held_out:])
        row = _key(cell, sizes) | measured | setting("cpu")
        _append(options.output, row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def _key(cell: Cell, sizes: Sizes) -> dict[str, str]:
    """The columns by which the row of a cell is known."""
    fields = asdict(cell) | asdict(sizes) | {"steps": round(cell.share * sizes.steps)}
    return {name: str(value) for name, value in fields.items()}


def _is_there(path: Path, key: dict[str, str]) -> bool:
    if not path.exists():
        return False
    with path.open(newline="", encoding="utf-8") as file:
        return any(key.items() <= row.items() for row in csv.DictReader(file))


def _append(path: Path, row: dict[str, object]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
