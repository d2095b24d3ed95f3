"""The heat map of a run that merges tokens: how much each layer and KV head merges, in its last report."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

_RATE = re.compile(r"merge_rate/layer_(\d+)/head_(\d+)")
_MOST_NUMBERS = 160
"""Cells up to which each shows its number."""


def last_merge_rates(reports: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], float]:
    """Merge rate by (layer, KV head), of the last report that has them; a rate that was not finite is nan."""
    for report in reversed(reports):
        rates = {
            (int(match[1]), int(match[2])): float("nan") if rate is None else rate
            for name, rate in report.items()
            if (match := _RATE.fullmatch(name))
        }
        if rates:
            return rates
    return {}


def draw_merge_map(axes: Axes, rates: Mapping[tuple[int, int], float]) -> None:
    """Layers upwards, KV heads to the right; cells show tokens per slot where there is room."""
    layers, heads = sorted({layer for layer, _ in rates}), sorted({head for _, head in rates})
    grid = [[rates[layer, head] for head in heads] for layer in layers]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
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
            for column, rate in enumerate(values):
                colour = "black" if rate > 0.6 else "white"
                tokens = 1 / max(1 - rate, 1e-3)
                axes.text(column, row, f"{tokens:.3g}", ha="center", va="center", color=colour, fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, label="share of tokens merged")
    bar.outline.set_visible(False)
