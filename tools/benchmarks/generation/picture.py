"""The numbers of a comparison as a picture of small diagrams."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lckv_megatron.measuring.comparison import Row

LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
}
COLOURS = ("#8a94a6", "#2f6fb3", "#3f9b6c", "#d9622b", "#7b4ea3", "#b8912f", "#b03a5b", "#2b9fa8")
INK = "#1f2937"


@dataclass(frozen=True)
class Bars:
    """A diagram with a bar for each model."""

    measure: str
    title: str
    """May say {at}."""


BARS = (
    Bars("KV bytes per token", "KV cache, bytes per token"),
    Bars("largest batch", "Batch that fits ({at} tokens each)"),
    Bars("tokens per second", "Tokens/s of that batch"),
    Bars("prefill", "Reading {at} tokens, ms"),
    Bars("first token", "First token after {at}, ms"),
)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG. Of measures that were taken at several lengths, the longest is shown."""
    names = list(dict.fromkeys(row.model for row in rows))
    with rc_context(LOOK):
        figure = Figure(figsize=(10.5, 2.2 + 0.62 * len(names)), dpi=160, layout="constrained")
        axes = figure.subplots(2, 3).ravel()
        for place, bars in zip(axes, BARS, strict=False):
            _draw_bars(place, bars, rows, names)
        _draw_steps(axes[-1], rows, names)
        lines = [
            Line2D([], [], color=_colour(index), marker="o", markersize=4) for index in range(len(names))
        ]
        figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
        figure.savefig(path, format="png")


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw_bars(axes: Axes, bars: Bars, rows: Sequence[Row], names: Sequence[str]) -> None:
    measured = [row for row in rows if row.measure == bars.measure]
    at = max(row.at for row in measured)
    # The last of each model: lengths grow, and what is measured of a batch is measured once.
    by_name = {row.model: row for row in sorted(measured, key=lambda row: row.at)}
    values = [by_name[name].value for name in names]
    axes.barh(names, values, color=[_colour(index) for index in range(len(names))], height=0.7)
    for index, name in enumerate(names):
        ratio = "" if index == 0 else f"  ({by_name[name].ratio:.3g}x)"
        text = f" {values[index]:,.{0 if values[index] >= 8 else 2}f}{ratio}"
        axes.text(values[index], index, text, va="center", color=INK, fontsize=8)
    axes.set_title(bars.title.format(at=f"{at:,}"))
    axes.set_xlim(0, 1.5 * max(values))
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_steps(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Time of a decoding step over the batch; the last point of each line is the largest batch."""
    for index, name in enumerate(names):
        measured = [
            row for row in rows if row.model == name and row.measure in ("decode step", "largest decode step")
        ]
        points = sorted((row.at, row.value) for row in measured)
        axes.plot(*zip(*points, strict=True), color=_colour(index), marker="o", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="sequences at once")
    axes.set_title("Decoding step, ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.92")
