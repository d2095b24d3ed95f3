"""Draws loss against bytes of KV cache: every model of a study, and the front of those that none beats."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from lckv_megatron.pictures.names import as_written

LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": "0.92",
}
_FRONT, _DOMINATED = "#2f6fb3", "0.6"
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (8, 16, 26, 38, 52)
"""Of a label from its point, in points of 1/72 inch."""


@dataclass(frozen=True)
class Mark:
    """One model."""

    name: str
    kv_bytes: float
    loss: float
    spread: float
    """Length of each half of the error bar."""

    on_front: bool


def draw_front(marks: Sequence[Mark], *, seeds: str) -> Figure:
    """The diagram; `seeds` says what error bars are."""
    figure = Figure(figsize=(10.5, 6.6), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    front = _front_of(marks)
    axes.step(
        [mark.kv_bytes for mark in front],
        [mark.loss for mark in front],
        where="post",
        color=_FRONT,
        alpha=0.5,
    )
    for mark in marks:
        axes.errorbar(
            mark.kv_bytes, mark.loss, yerr=mark.spread or None, fmt="o", markersize=6, capsize=3,
            color=_FRONT if mark.on_front else _DOMINATED, zorder=3 if mark.on_front else 2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.margins(0.12, 0.1)
    axes.set_xlabel("bytes of KV cache for a token of context, as allocated")
    axes.set_ylabel("loss through the cache (nats per token)")
    axes.set_title(f"Down and left is better; blue: no other model is better in both. {seeds}", loc="left")
    _add_labels(figure, axes, marks)
    return figure


def _add_labels(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Write the names where they cover least: those of the front choose first."""
    figure.draw_without_rendering()  # only now it is known where the points lie on the page
    scale = figure.dpi / 72
    renderer = FigureCanvasAgg(figure).get_renderer()
    taken = [_drawn(axes, [(mark.kv_bytes, mark.loss)], 5 * scale) for mark in marks]
    taken += [_drawn(axes, line, 2 * scale) for line in _lines(marks)]
    for mark in sorted(marks, key=lambda mark: (not mark.on_front, mark.kv_bytes)):
        label = axes.annotate(
            as_written(mark.name), (mark.kv_bytes, mark.loss), xytext=(0, 0),
            textcoords="offset points", fontsize=8.5,
            color=_FRONT if mark.on_front else "0.35", zorder=4,
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "shrinkB": 4},
        )  # fmt: skip
        extent = label.get_window_extent(renderer)
        place = axes.transData.transform((mark.kv_bytes, mark.loss))
        best = min(
            _places(place, extent.width, extent.height, scale),
            key=lambda choice: _cost(choice[1], taken, axes.bbox, choice[0]),
        )
        distance, box = best
        label.set_position(((box.x0 - place[0]) / scale, (box.y0 - place[1]) / scale))
        if distance <= _DISTANCES[0] and label.arrow_patch is not None:
            label.arrow_patch.set_visible(False)
        taken.append(box)


def _places(place: Any, width: float, height: float, scale: float) -> Iterator[tuple[int, Bbox]]:
    """Where a label can stand: its distance, and its box in pixels."""
    for distance, (right, up) in product(_DISTANCES, _DIRECTIONS):
        far = distance * scale
        left = place[0] + right * far - (width if right < 0 else width / 2 if right == 0 else 0)
        bottom = place[1] + up * far - (height if up < 0 else height / 2 if up == 0 else 0)
        yield distance, Bbox.from_bounds(left, bottom, width, height)


def _cost(box: Bbox, taken: Sequence[Bbox], inside: Bbox, distance: int) -> float:
    """Pixels that a label would cover or leave the diagram by, and a little for its distance."""
    covered = 0.0
    for other in taken:
        common = Bbox.intersection(box, other)
        covered += common.width * common.height if common is not None else 0.0
    kept = Bbox.intersection(box, inside)
    outside = box.width * box.height - (kept.width * kept.height if kept is not None else 0.0)
    return covered + outside + distance / 10


def _lines(marks: Sequence[Mark]) -> Iterator[list[tuple[float, float]]]:
    """Both ends of error bars, and of the front's steps."""
    for mark in marks:
        yield [(mark.kv_bytes, mark.loss - mark.spread), (mark.kv_bytes, mark.loss + mark.spread)]
    for mark, right in pairwise(_front_of(marks)):
        yield [(mark.kv_bytes, mark.loss), (right.kv_bytes, mark.loss)]
        yield [(right.kv_bytes, mark.loss), (right.kv_bytes, right.loss)]


def _front_of(marks: Sequence[Mark]) -> list[Mark]:
    return sorted((mark for mark in marks if mark.on_front), key=lambda mark: mark.kv_bytes)


def _drawn(axes: Axes, points: Sequence[tuple[float, float]], radius: float) -> Bbox:
    """The box in pixels round points of the diagram."""
    places = axes.transData.transform(points)
    (left, bottom), (right, top) = places.min(0) - radius, places.max(0) + radius
    return Bbox.from_extents(left, bottom, right, top)
