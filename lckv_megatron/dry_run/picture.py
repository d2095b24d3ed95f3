"""Draws memory over a step, stacked by kind, a panel for each rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lckv_megatron.dry_run.memory import KINDS, Curve
from lckv_megatron.dry_run.rank import RankRun
from lckv_megatron.pictures.files import write_picture

COLOURS = ("#2f6fb3", "#7aa6d6", "#9a86c4", "#d9622b", "#c8cdd4")
"""Of the kinds, in their order."""
_LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "0.9",
}


def draw(ranks: Sequence[RankRun], usable_bytes: int, output: Path) -> None:
    """Write the picture as PNG.

    Raises ConfigError where the file cannot be written.
    """
    write_picture(lambda: figure(ranks, usable_bytes), _LOOK, output)


def figure(ranks: Sequence[RankRun], usable_bytes: int) -> Figure:
    """A panel for each rank, all on one scale; the usable memory where it is near."""
    picture = Figure(figsize=(8, 0.8 + 2.6 * len(ranks)), layout="constrained", dpi=150)
    panels = picture.subplots(len(ranks), squeeze=False, sharey=True)[:, 0]
    for axes, rank in zip(panels, ranks, strict=True):
        _draw_rank(axes, rank, usable_bytes)
    panels[-1].set_xlabel("milliseconds of kernels (estimated), in a step of PP + 1 micro-batches")
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return picture


def _draw_rank(axes: Axes, rank: RankRun, usable_bytes: int) -> None:
    times, stacked = _steps(rank.memory)
    axes.stackplot(times, stacked, labels=KINDS, colors=COLOURS, linewidth=0)
    at = int(rank.memory.bytes.sum(0).argmax())
    peak = rank.memory.peak_bytes / 2**30
    axes.plot([_milliseconds(rank.memory)[at]], [peak], "v", color="#1f2937", markersize=5)
    if usable_bytes <= 2 * rank.memory.peak_bytes:
        axes.axhline(usable_bytes / 2**30, color="#b3261e", linestyle="--", linewidth=1, label="usable")
    axes.set_title(f"rank {rank.rank}, stage {rank.stage}: peak {peak:,.2f} GiB", loc="left")
    axes.set_ylabel("GiB")
    axes.set_xlim(0, max(times[-1], 1e-6))
    axes.margins(y=0.1)


def _steps(memory: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds [2n - 1] from 0 and GiB [kinds, 2n - 1]: a change is upright."""
    return np.repeat(_milliseconds(memory), 2)[1:], np.repeat(memory.bytes / 2**30, 2, axis=1)[:, :-1]


def _milliseconds(memory: Curve) -> np.ndarray:
    return 1000 * (memory.seconds - memory.seconds[0])
