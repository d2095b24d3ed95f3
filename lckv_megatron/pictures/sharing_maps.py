"""Draws sharing maps.

Layers stand bottom to top. A filled box computes keys and values; a line runs from every layer that reads
another's to the layer that it reads, a dashed one to the layer whose keys and values it mixes into its own,
or into those that it reads, and a dotted one to a layer of which it reads the values alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import layer_groups
from lckv_megatron.pictures.names import as_written

INCH = 0.4
"""Inches of a unit; a layer is one unit high."""
BOX_WIDTH, BOX_HEIGHT = 2.0, 0.7
LANE = 0.32
"""Horizontal distance of two lines."""
LEFT, RIGHT = 1.25, 0.35
"""Room for brackets, and between maps."""
TITLE_CHARACTER = 0.23
"""Width of a letter in a title."""
INK, KV_FILL, READER_FILL, DOWNWARD, UPWARD = "#1f2937", "#2f6fb3", "#e8eff7", "#2f6fb3", "#d9622b"
MIXED_LINE = (0, (3, 2))
"""Dashes of what is mixed in."""
VALUES_LINE = (0, (1, 1.5))
"""Dots of values that are read without keys."""
ARROW = "-|>,head_width=0.2,head_length=0.4"
FONT: dict[Any, Any] = {"font.family": "sans-serif", "font.size": 9}


@dataclass(frozen=True)
class Titled:
    """A map and what stands above it."""

    title: str
    layer_types: LayerTypes


@dataclass(frozen=True)
class Reads:
    """The layers that read one source from below it, or from above; or that mix its keys and values into
    others, or read its values alone."""

    source: int
    readers: tuple[int, ...]
    mixed: bool = False
    values: bool = False

    @property
    def upward(self) -> bool:
        """Whether the source stands above its readers, so that they iterate."""
        return self.readers[0] < self.source

    @property
    def span(self) -> range:
        """Layers that the line passes."""
        ends = (*self.readers, self.source)
        return range(min(ends), max(ends) + 1)

    def meets(self, other: "Reads") -> bool:
        """Whether the two lines would be taken for one if drawn above each other."""
        apart = self.span.stop <= other.span.start or other.span.stop <= self.span.start
        same = replace(self, readers=()) == replace(other, readers=())
        return not same and not apart


def all_reads(layer_types: LayerTypes) -> list[Reads]:
    """Who reads whom, a layer's own keys and values left out; a source read from both sides occurs twice.
    Then who mixes in whose, and who reads whose values alone."""
    reads = []
    for source in layer_types.kv_layers:
        readers = layer_types.key_readers(source)
        sides = (
            tuple(reader for reader in readers if reader < source),
            tuple(reader for reader in readers if reader > source),
        )
        reads += [Reads(source, side) for side in sides if side]
    for source in layer_types.kv_layers:
        mixers = tuple(layer.index for layer in layer_types if layer.mixes == source)
        apart = tuple(layer.index for layer in layer_types if layer.values == source)
        reads += [Reads(source, mixers, mixed=True)] if mixers else []
        reads += [Reads(source, apart, values=True)] if apart else []
    return reads


def lanes(reads: Sequence[Reads]) -> list[int]:
    """A lane for each line, from 0 at the boxes, such that lines to different sources do not meet; short
    lines stay near."""
    taken: list[list[Reads]] = []
    chosen = [0] * len(reads)
    for index in sorted(range(len(reads)), key=lambda index: len(reads[index].span)):
        free = [not any(reads[index].meets(other) for other in lane) for lane in taken]
        lane = free.index(True) if any(free) else len(taken)
        if lane == len(taken):
            taken.append([])
        taken[lane].append(reads[index])
        chosen[index] = lane
    return chosen


def draw(maps: Sequence[Titled], *, passes: str = "m + b") -> Figure:
    """All maps side by side, with a legend below. `passes` says how often iterated layers run."""
    depth = max(len(drawn.layer_types) for drawn in maps)
    widths = [_width(drawn) for drawn in maps]
    entries = _legend([drawn.layer_types for drawn in maps])
    columns = max(1, min(len(entries), int(sum(widths) * INCH / 2.2)))
    legend_height = 0.22 * math.ceil(len(entries) / columns) + 0.2
    width, height = max(3.4, INCH * sum(widths)), INCH * (depth + 0.9) + legend_height
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
    left = (1 - INCH * sum(widths) / width) / 2
    for drawn, units in zip(maps, widths, strict=True):
        axes = figure.add_axes(
            (left, legend_height / height, INCH * units / width, 1 - legend_height / height)
        )
        axes.set(xlim=(-LEFT, units - LEFT), ylim=(-0.2, depth + 0.7))
        axes.axis("off")
        _draw_map(axes, drawn, passes)
        left += INCH * units / width
    figure.legend(
        *zip(*entries, strict=True),
        loc="lower center",
        ncols=columns,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.6,
    )
    return figure


def _legend(maps: Sequence[LayerTypes]) -> list[tuple[Artist, str]]:
    """What the signs mean that occur in `maps`."""
    reads = [line for layer_types in maps for line in all_reads(layer_types)]
    entries: list[tuple[Artist, str, bool]] = [
        (Patch(facecolor=KV_FILL, edgecolor=KV_FILL), "computes keys and values", True),
        (
            Patch(facecolor=READER_FILL, edgecolor=KV_FILL),
            "computes none",
            any(len(layer_types.kv_layers) < len(layer_types) for layer_types in maps),
        ),
        (
            Patch(facecolor="white", edgecolor=KV_FILL, hatch="||||", linewidth=0),
            "sees a window only",
            any(layer_types.any_sliding for layer_types in maps),
        ),
        (
            _arrow(DOWNWARD),
            "reads a layer below",
            any(not (line.upward or line.mixed or line.values) for line in reads),
        ),
        (_arrow(UPWARD), "reads a layer above: iterated", any(line.upward for line in reads)),
        (
            _arrow(DOWNWARD, MIXED_LINE),
            "mixes in those of a layer below",
            any(line.mixed for line in reads),
        ),
        (
            _arrow(DOWNWARD, VALUES_LINE),
            "reads the values of a layer below",
            any(line.values for line in reads),
        ),
    ]
    return [(artist, text) for artist, text, occurs in entries if occurs]


def _arrow(colour: str, style: Any = "-") -> Line2D:
    return Line2D(
        [0, 1], [0, 0], color=colour, linewidth=1.3, linestyle=style, marker="<", markersize=5, markevery=[0]
    )


def _width(drawn: Titled) -> float:
    lines = LANE * (1.2 + max(lanes(all_reads(drawn.layer_types)), default=0))
    title = (TITLE_CHARACTER * len(drawn.title) - BOX_WIDTH) / 2
    return LEFT + BOX_WIDTH + max(lines, title) + RIGHT


def _draw_map(axes: Axes, drawn: Titled, passes: str) -> None:
    layer_types = drawn.layer_types
    axes.text(
        BOX_WIDTH / 2,
        len(layer_types) + 0.05,
        as_written(drawn.title),
        ha="center",
        va="bottom",
        fontsize=10,
        weight="bold",
        color=INK,
    )
    for layer in layer_types:
        computes_kv = layer.index in layer_types.kv_layers
        axes.add_patch(_box((0, layer.index), computes_kv=computes_kv))
        if layer.sliding:
            for x in (0.16, 0.3, 0.44):
                axes.add_patch(
                    Rectangle(
                        (x, layer.index + 0.2),
                        0.07,
                        BOX_HEIGHT - 0.4,
                        color="white" if computes_kv else KV_FILL,
                    )
                )
        x, y = BOX_WIDTH / 2 + 0.2 * layer.sliding, layer.index + BOX_HEIGHT / 2
        axes.text(
            x,
            y,
            f"layer {layer.index}",
            ha="center",
            va="center_baseline",
            color="white" if computes_kv else INK,
        )
    reads = all_reads(layer_types)
    for line, lane in zip(reads, lanes(reads), strict=True):
        source = layer_types[line.source]
        both = source.source != source.index or source.mixes is not None
        _line(axes, line, BOX_WIDTH + LANE * (1.2 + lane), both=both)
    for group in layer_groups(layer_types):
        if group.iterated:
            separator = "\n" if group.stop - group.start <= 2 else " "
            _bracket(axes, group.start, group.stop - 1, f"{passes}{separator}passes")


def _box(corner: tuple[float, float], *, computes_kv: bool) -> FancyBboxPatch:
    fill = KV_FILL if computes_kv else READER_FILL
    style = "round,pad=0,rounding_size=0.12"
    return FancyBboxPatch(
        corner, BOX_WIDTH, BOX_HEIGHT, style, facecolor=fill, edgecolor=KV_FILL, linewidth=1
    )


def _line(axes: Axes, reads: Reads, x: float, *, both: bool) -> None:
    """From readers to their source; where the source is a reader too (`both`),
    the line arrives above the one that leaves."""
    look: dict[str, Any] = {
        "color": UPWARD if reads.upward else DOWNWARD,
        "linewidth": 1.3,
        "linestyle": MIXED_LINE if reads.mixed else VALUES_LINE if reads.values else "-",
        "solid_capstyle": "round",
    }
    heights = [reader + BOX_HEIGHT / 2 for reader in reads.readers]
    arrival = reads.source + BOX_HEIGHT / 2 + 0.15 * both + 0.15 * (reads.mixed or reads.values)
    for height in heights:
        axes.plot([BOX_WIDTH, x], [height, height], **look)
    axes.plot([x, x], [min(*heights, arrival), max(*heights, arrival)], **look)
    tip = {"arrowstyle": ARROW, "color": look["color"], "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (BOX_WIDTH, arrival), (x, arrival), arrowprops=tip)


def _bracket(axes: Axes, bottom: int, top: int, text: str) -> None:
    x, low, high = -0.2, bottom, top + BOX_HEIGHT
    axes.plot(
        [x, x - 0.2, x - 0.2, x], [low, low, high, high], color=UPWARD, linewidth=1.3, solid_capstyle="round"
    )
    axes.text(x - 0.35, (low + high) / 2, text, rotation=90, ha="right", va="center", color=UPWARD)


def parse(text: str) -> Titled:
    """`MAP` or `TITLE: MAP`; raises ValueError where the map cannot be read."""
    title, colon, layer_types = text.rpartition(":")
    layer_types = layer_types.strip()
    return Titled(
        title.strip() if colon else layer_types, LayerTypes.parse(layer_types, layer_types.count("_") + 1)
    )
