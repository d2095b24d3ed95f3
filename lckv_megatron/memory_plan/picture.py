"""Draws where the storages of a step lie, a panel for each rank."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lckv_megatron.memory_plan.rank import RankPlan
from lckv_megatron.memory_plan.requests import Request
from lckv_megatron.pictures.curves import LOOK
from lckv_megatron.pictures.files import write_picture

_CLASSES = {"persistent": "#2f6fb3", "kept for backward": "#d9622b", "others": "#9a86c4"}
_LINES = {
    "planned": ("#1f2937", "-"),
    "expandable segments": ("#2e7d32", "--"),
    "segments": ("#b3261e", "--"),
}


def draw(plans: Sequence[RankPlan], output: Path) -> None:
    """Write the picture as PNG.

    Raises ConfigError where the file cannot be written.
    """
    write_picture(lambda: figure(plans), LOOK, output)


def figure(plans: Sequence[RankPlan]) -> Figure:
    """A panel for each rank."""
    picture = Figure(figsize=(8, 0.8 + 2.8 * len(plans)), layout="constrained", dpi=150)
    panels = picture.subplots(len(plans), squeeze=False)[:, 0]
    for axes, plan in zip(panels, plans, strict=True):
        _draw_rank(axes, plan)
    panels[-1].set_xlabel("events of a step: storages that come or go")
    patches = [Patch(color=colour, label=label) for label, colour in _CLASSES.items()]
    lines = [line for line in panels[0].get_lines() if not str(line.get_label()).startswith("_")]
    picture.legend(handles=[*lines[::-1], *patches[::-1]], loc="outside right center", frameon=False)
    return picture


def _draw_rank(axes: Axes, plan: RankPlan) -> None:
    placement = plan.placement
    base, kept = plan.persistent, placement.kept
    first = min(request.start for request in placement.addresses)
    last = max(request.end for request in placement.addresses) - first
    axes.fill_between([0, last], 0, base / 2**30, color=_CLASSES["persistent"], linewidth=0)
    for label, members in (
        ("kept for backward", [request for request in placement.addresses if request in kept]),
        ("others", [request for request in placement.addresses if request not in kept]),
    ):
        corners = [_corners(request, base + placement.addresses[request], first) for request in members]
        axes.add_collection(PolyCollection(corners, facecolors=_CLASSES[label], edgecolors="white", lw=0.1))
    heights = (plan.peak, plan.expandable.reserved, plan.segments.reserved)
    for (label, (colour, style)), height in zip(_LINES.items(), heights, strict=True):
        axes.axhline(height / 2**30, color=colour, linestyle=style, linewidth=1, label=label)
    axes.set_title(f"rank {plan.rank}: live bytes reach {plan.live_peak / 2**30:,.2f} GiB", loc="left")
    axes.set_ylabel("address, GiB")
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1.05 * max(heights) / 2**30)


def _corners(request: Request, address: int, first: int) -> np.ndarray:
    """[4, 2] of the rectangle."""
    low, high = address / 2**30, (address + request.bytes) / 2**30
    start, end = request.start - first, request.end - first
    return np.array([(start, low), (end, low), (end, high), (start, high)])
