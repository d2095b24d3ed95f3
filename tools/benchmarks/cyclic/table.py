"""The rows of the benchmark of cyclic training as a table."""

import csv
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tools.benchmarks.cyclic.grid import PUBLISHED_MAP, Cell

HEAD = (
    "map", "m, b", "settings", "FLOPs", "CPU", "exact", "to 7, 2", "1 pass", "2 passes",
    "twice as long", "passes",
)  # fmt: skip


def table(path: Path) -> list[str]:
    """Lines of Markdown: a cell each, in the order of the rows; means over seeds. How far the exact loss is
    from that of the published passes is given for each seed. ValueError for rows of several sizes."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sizes = {tuple(row[name] for name in ("hidden_size", "rows", "length", "learning_rate")) for row in rows}
    if len(sizes) > 1:
        raise ValueError(f"{path} has rows of {len(sizes)} sizes or learning rates; give each its own file")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        settings = ("map", "m", "b", "first_guess", "agreement", "schedule", "least", "share", "fp8")
        groups.setdefault(tuple(row[name] for name in settings), []).append(row)
    published = {row["seed"]: float(row["loss_exact"]) for row in rows if _is_published(row)}
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    return [*lines, *(f"| {' | '.join(_cells(group, published))} |" for group in groups.values())]


def _is_published(row: dict[str, str]) -> bool:
    """Whether it was trained as LCKV was published."""
    cell = Cell(PUBLISHED_MAP, 7, 2, seed=int(row["seed"]))
    return all(row[name] == str(value) for name, value in asdict(cell).items())


def _cells(group: list[dict[str, str]], published: dict[str, float]) -> Iterator[str]:
    """Of a line. `published`: exact loss for each seed."""
    first = group[0]
    settings = []
    if first["first_guess"] == "True":
        settings.append("first guess")
    if float(first["agreement"]):
        settings.append(f"agreement {first['agreement']}")
    if first["schedule"] != "constant":
        settings.append(f"m {first['schedule']} from {first['least']}")
    if float(first["share"]) != 1:
        settings.append(f"{float(first['share']):.0%} of steps")
    if first["fp8"] == "True":
        settings.append("FP8")
    is_plain = first["map"] == "plain"
    yield first["map"]
    yield "-" if is_plain else f"{first['m']}, {first['b']}"
    yield ", ".join(settings) or "-"
    start = "guess" if first["first_guess"] == "True" else "zeros"
    columns = {
        "flops_of_plain_step": ".2f", "cpu_seconds_of_plain_step": ".2f", "loss_exact": ".3f",
        f"loss_{start}_1": ".3f", f"loss_{start}_2": ".3f",
        "loss_exact_twice_the_length": ".3f", "passes_until_exact": ".1f",
    }  # fmt: skip
    iterated = {f"loss_{start}_1", f"loss_{start}_2", "passes_until_exact"}
    for name, form in columns.items():
        value = statistics.mean(float(row[name]) for row in group)
        yield "-" if is_plain and name in iterated else format(value, form)
        if name == "loss_exact":
            yield ", ".join(
                f"{float(row[name]) - published[row['seed']]:+.3f}" if row["seed"] in published else "?"
                for row in sorted(group, key=lambda row: row["seed"])
            )
