"""Draws the curves of one or several runs from their metrics files."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lckv_megatron.pictures.end_labels import EndLabel, add_end_labels
from lckv_megatron.pictures.heat_map import Cells, draw_heat_map, last_statistics
from lckv_megatron.pictures.names import as_written
from lckv_megatron.pictures.runs import X_LABELS, Run
from lckv_megatron.pictures.smoothing import FEWEST_POINTS, exponential, trend
from megatron_ext.errors import ConfigError

LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.formatter.min_exponent": 3,  # logarithmic axes say 0.5 and 20, not powers of ten
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "0.9",
}
FEW_POINTS = 20
"""Curves of fewer points show them; one point is no line."""


@dataclass(frozen=True)
class Style:
    """How curves are drawn."""

    x: str
    """The abscissa: one of `X_LABELS`."""

    smoothing: float | None = None
    """Share of the past in each point of a smoothed curve, in [0, 1); 0: none. None: the trend of curves that
    have many points."""

    start: float = 0
    """Abscissa at which curves begin."""

    def smooths(self, points: int) -> bool:
        """Whether a curve of so many points is drawn smoothed."""
        return points >= FEWEST_POINTS if self.smoothing is None else self.smoothing > 0

    def smooth(self, ordinates: Sequence[float]) -> list[float]:
        """A curve as it is drawn."""
        if not self.smooths(len(ordinates)):
            return list(ordinates)
        return trend(ordinates) if self.smoothing is None else exponential(ordinates, self.smoothing)

    def last(self, run: Run, value: str) -> float | None:
        """Where the curve of `value` ends; None where there is none."""
        ordinates = self.smooth(run.series(value, self.x, self.start)[1])
        return next((ordinate for ordinate in reversed(ordinates) if not math.isnan(ordinate)), None)


@dataclass(frozen=True)
class Panel:
    """One diagram. It is left out where no run has any of its values."""

    title: str
    values: tuple[str, ...]
    draw: Callable[[Axes, Sequence[Run], Style], None]
    over_time: bool = True
    """Whether the abscissa is that of the style."""

    labelled: tuple[str, ...] = ()
    """Values of which the last is written at the end of the curve: the first of them that a run has."""


def draw_curves(axes: Axes, runs: Sequence[Run], style: Style, value: str, **line: Any) -> None:
    """One curve per run, in the run's colour; where curves are smoothed,
    the points themselves stay visible behind."""
    for index, run in enumerate(runs):
        abscissas, ordinates = run.series(value, style.x, style.start)
        colour = f"C{index % 10}"
        if style.smooths(len(ordinates)):
            axes.plot(abscissas, ordinates, color=colour, alpha=0.2, linewidth=1)
        marker = "." if len(abscissas) < FEW_POINTS else ""
        look = {"color": colour, "linewidth": 1.5, "marker": marker, **line}
        axes.plot(abscissas, style.smooth(ordinates), **look)


def draw_loss(axes: Axes, runs: Sequence[Run], style: Style) -> None:
    """Training loss as a line, validation loss as rings joined by dashes."""
    rings: dict[str, Any] = {
        "linestyle": "--",
        "linewidth": 1,
        "marker": "o",
        "markersize": 5,
        "markerfacecolor": "white",
    }
    draw_curves(axes, runs, style, "lm_loss")
    draw_curves(axes, runs, replace(style, smoothing=0), "validation_loss", zorder=3, **rings)
    axes.plot([], [], color="0.3", label="training")
    if any(run.series("validation_loss", style.x, style.start)[0] for run in runs):
        axes.plot([], [], color="0.3", label="validation", **rings)
    axes.legend(frameon=False)
    axes.set_ylabel("cross-entropy (nats per token)")


def draw_learning_rate(axes: Axes, runs: Sequence[Run], style: Style) -> None:
    """The learning rate as it was used."""
    draw_curves(axes, runs, replace(style, smoothing=0), "learning_rate", alpha=0.7)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0), useMathText=True)


def draw_grad_norm(axes: Axes, runs: Sequence[Run], style: Style) -> None:
    """The gradient norm before clipping, on a logarithmic scale: spikes are what one looks for."""
    draw_curves(axes, runs, style, "grad_norm")
    axes.set_yscale("log")
    axes.set_ylabel("gradient norm before clipping")


def draw_tokens_per_second(axes: Axes, runs: Sequence[Run], style: Style) -> None:
    """Speed over all devices."""
    draw_curves(axes, runs, style, "tokens_per_second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("tokens per second")


def draw_memory(axes: Axes, runs: Sequence[Run], style: Style) -> None:
    """Memory in use when a step was reported as a line, the most so far as dots."""
    peak: dict[str, Any] = {"linestyle": ":", "marker": ""}
    draw_curves(axes, runs, replace(style, smoothing=0), "current_memory_bytes")
    draw_curves(axes, runs, replace(style, smoothing=0), "peak_memory_bytes", **peak)
    axes.plot([], [], color="0.3", label="in use")
    axes.plot([], [], color="0.3", label="peak", **peak)
    axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value / 2**30:.3g}")
    axes.set_ylabel("memory of rank 0 (GiB)")


def draw_compression_ratio(axes: Axes, runs: Sequence[Run], style: Style) -> None:
    """Tokens per slot in training as a line, what is asked for as dashes, in evaluation as rings."""
    target: dict[str, Any] = {"linestyle": ":", "marker": ""}
    rings: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5, "markerfacecolor": "white"}
    draw_curves(axes, runs, style, "compression_ratio")
    draw_curves(axes, runs, replace(style, smoothing=0), "target_compression_ratio", **target)
    draw_curves(axes, runs, replace(style, smoothing=0), "validation_compression_ratio", zorder=3, **rings)
    axes.plot([], [], color="0.3", label="training")
    axes.plot([], [], color="0.3", label="target", **target)
    axes.plot([], [], color="0.3", label="validation", **rings)
    axes.legend(frameon=False)
    axes.set_ylabel("tokens per slot")


def heat_maps(runs: Sequence[Run]) -> list[Panel]:
    """A heat map for each statistic of each run's KV policy."""
    return [
        _heat_map(run, name, cells)
        for run in runs
        for name, cells in sorted(last_statistics(run.reports).items())
    ]


def _heat_map(run: Run, name: str, cells: Cells) -> Panel:
    title, label = f"{as_written(run.name)}: {name} at the end", name.replace("_", " ")
    return Panel(title, (), lambda axes, _runs, _style: draw_heat_map(axes, cells, label), over_time=False)


PANELS = (
    Panel("Loss", ("lm_loss", "validation_loss"), draw_loss, labelled=("validation_loss", "lm_loss")),
    Panel("Learning rate", ("learning_rate",), draw_learning_rate),
    Panel("Gradient norm", ("grad_norm",), draw_grad_norm),
    Panel("Speed", ("tokens_per_second",), draw_tokens_per_second, labelled=("tokens_per_second",)),
    Panel("Memory", ("peak_memory_bytes",), draw_memory),
    Panel(
        "Compression",
        ("compression_ratio",),
        draw_compression_ratio,
        labelled=("validation_compression_ratio", "compression_ratio"),
    ),
)


def plot(runs: Sequence[Run], style: Style) -> Figure:
    """All panels that some run has values for; raises ConfigError if there are none."""
    panels = [panel for panel in PANELS if any(_has(run, panel, style) for run in runs)] + heat_maps(runs)
    if not panels:
        wanted = ", ".join(value for panel in PANELS for value in panel.values)
        raise ConfigError(
            f"no report from {style.x} {style.start:g} on has one of {wanted}; there is nothing to draw. "
            "Choose another --x or --start."
        )
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows + 0.6), dpi=120, layout="constrained")
    labels: list[EndLabel] = []
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        panel.draw(axes, runs, style)
        axes.set_title(panel.title)
        if panel.over_time:
            _label_abscissa(axes, style)
        labels += _end_labels(axes, panel, runs, style)
    handles = [
        figure.axes[0].plot([], [], color=f"C{index % 10}", linewidth=3)[0] for index in range(len(runs))
    ]
    names = [as_written(run.name) for run in runs]
    figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(runs)), frameon=False)
    add_end_labels(figure, labels)
    return figure


def _end_labels(axes: Axes, panel: Panel, runs: Sequence[Run], style: Style) -> Iterator[EndLabel]:
    for index, run in enumerate(runs):
        ends = [
            (replace(style, smoothing=0) if value.startswith("validation") else style).last(run, value)
            for value in panel.labelled
        ]
        end = next((end for end in ends if end is not None and math.isfinite(end)), None)
        if end is not None:
            text = EngFormatter(places=0, sep="")(end) if end >= 1000 else f"{end:#.4g}"
            yield EndLabel(axes, end, text, f"C{index % 10}")


def _has(run: Run, panel: Panel, style: Style) -> bool:
    return any(run.series(value, style.x, style.start)[0] for value in panel.values)


def _label_abscissa(axes: Axes, style: Style) -> None:
    axes.set_xlabel(X_LABELS[style.x])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
