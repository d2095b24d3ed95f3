"""The table of a study: a row for each model with each seed; means over seeds, and the front."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ext.atomic import write_file
from megatron_ext.errors import ConfigError

COLUMNS = (
    "model", "seed", "key", "kv_bytes_per_token", "loss", "bits_per_byte", "tokens_per_slot",
    "training_flops", "training_tokens", "training_seconds", "parameters", "measured_tokens",
    "prefill_ms", "prefill_passes", "largest_batch", "tokens_per_second", "dtype", "hardware",
    "python_torch", "date",
)  # fmt: skip

Row = dict[str, str]


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by their keys; none where there is no file. Raises ConfigError."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ConfigError(
                f"{path} is not a table of this program: its columns are {reader.fieldnames}; move it away."
            )
        return {row["key"]: row for row in map(partial(_checked, path, reader), reader)}


def _checked(path: Path, reader: "csv.DictReader[str]", row: Row) -> Row:
    """The row, if a point can be made of it."""
    try:
        if None not in row.values() and None not in row and row["key"]:
            float(row["loss"]), float(row["kv_bytes_per_token"])
            return row
    except ValueError:
        pass
    raise ConfigError(
        f"{path}, line {reader.line_num}, is no row with a key, a loss and bytes of cache: mend or delete it."
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a file of rows; a cell that a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


@dataclass(frozen=True)
class Point:
    """A model of the study, its seeds together."""

    model: str
    losses: tuple[float, ...]
    """Nats per token, one of each seed."""

    kv_bytes: float
    """Of a token of context, as allocated; the mean."""

    rows: tuple[Row, ...]

    @property
    def loss(self) -> float:
        """The mean."""
        return statistics.mean(self.losses)

    @property
    def spread(self) -> float:
        """Half of the distance between the largest and the smallest loss."""
        return (max(self.losses) - min(self.losses)) / 2

    def mean(self, column: str) -> float | None:
        """Of a column over the rows that have it; None: none has it."""
        values = [float(row[column]) for row in self.rows if row.get(column)]
        return statistics.mean(values) if values else None


def points_of(rows: Iterable[Row]) -> list[Point]:
    """The models, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    return [
        Point(
            model,
            tuple(float(row["loss"]) for row in group),
            statistics.mean(float(row["kv_bytes_per_token"]) for row in group),
            tuple(group),
        )
        for model, group in groups.items()
    ]


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in bytes without losing in loss, or the reverse; the smallest cache first. A
    loss that is not finite beats none."""
    front: list[Point] = []
    finite = [point for point in points if math.isfinite(point.loss)]
    for point in sorted(finite, key=lambda point: (point.kv_bytes, point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def table_of(points: Sequence[Point], reference: str) -> Iterator[str]:
    """Lines of Markdown, the largest cache first: bytes of cache for a token, loss in nats per token,
    operations of training; time of a prompt, largest batch and its tokens per second as multiples of the
    model `reference`'s."""
    unit = next((point for point in points if point.model == reference), None)
    front = {point.model for point in front_of(points)}
    head = ("model", "front", "bytes/token", "loss", "seeds", "tokens/slot", "FLOPs", "prompt", "batch",
            "decoding")  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for point in sorted(points, key=lambda point: (-point.kv_bytes, point.loss)):
        spread = f" ± {point.spread:.4f}" if len(point.losses) > 1 else ""
        rows.append(
            (
                point.model.replace("|", r"\|"),
                "yes" if point.model in front else "",
                f"{point.kv_bytes:,.0f}",
                f"{point.loss:.4f}{spread}",
                str(len(point.losses)),
                _number(point.mean("tokens_per_slot"), "{:.2f}"),
                _number(point.mean("training_flops"), "{:.3g}"),
                _ratio(point, unit, "prefill_ms"),
                _ratio(point, unit, "largest_batch"),
                _ratio(point, unit, "tokens_per_second"),
            )
        )
    yield from (f"| {' | '.join(cells)} |" for cells in rows)


def _ratio(point: Point, unit: Point | None, column: str) -> str:
    mine, other = point.mean(column), None if unit is None else unit.mean(column)
    return "-" if mine is None or not other else f"{mine / other:.2f}x"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
