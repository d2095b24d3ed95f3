"""The heat map of a KV policy's statistic: what each layer and KV head had in the last report of a run."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

_ENTRY = re.compile(r"(\w+)/layer_(\d+)/head_(\d+)")
_MOST_NUMBERS = 160
"""Cells up to which each shows its number."""


Cells = dict[tuple[int, int], float]
"""Values by (layer, KV head)."""


def last_statistics(reports: Sequence[Mapping[str, Any]]) -> dict[str, Cells]:
    """Each statistic by its name, of the last report that has it; a value that was not finite is nan."""
    statistics: dict[str, Cells] = {}
    for report in reversed(reports):
        cells: dict[str, Cells] = {}
        for key, value in report.items():
            if match := _ENTRY.fullmatch(key):
                place = int(match[2]), int(match[3])
                cells.setdefault(match[1], {})[place] = math.nan if value is None else value
        statistics = cells | statistics
    return statistics


def draw_heat_map(axes: Axes, cells: Mapping[tuple[int, int], float], label: str) -> None:
    """Layers upwards, KV heads to the right; cells show their values where there is room. Shares have the
    scale from 0 to 1."""
    layers, heads = sorted({layer for layer, _ in cells}), sorted({head for _, head in cells})
    grid = [[cells[layer, head] for head in heads] for layer in layers]
    finite = [value for value in cells.values() if math.isfinite(value)]
    low, high = min(0.0, *finite, 0.0), max(1.0, *finite, 1.0)
    image = axes.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto", origin="lower")
    axes.grid(False)
    axes.set_yticks(range(len(layers)), map(str, layers))
    axes.set_xticks(range(len(heads)), map(str, heads))
    if len(layers) > 24:
        axes.set_yticks(range(0, len(layers), 4), map(str, layers[::4]))
    if len(heads) > 16:
        axes.set_xticks(range(0, len(heads), 4), map(str, heads[::4]))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    if len(layers) * len(heads) <= _MOST_NUMBERS:
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                colour = "black" if value > low + 0.6 * (high - low) else "white"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, label=label)
    bar.outline.set_visible(False)
