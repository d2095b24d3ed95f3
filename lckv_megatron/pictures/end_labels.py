"""Numbers at the right end of curves."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_FONT_POINTS = 8.0
_DISTANCE_POINTS = 10.0
"""Least distance between two numbers: they shall not cover each other."""


@dataclass(frozen=True)
class EndLabel:
    """What stands beside the end of a curve."""

    axes: Axes
    ordinate: float
    """Where the curve ends, in the units of the axis."""

    text: str
    colour: str


def add_end_labels(figure: Figure, labels: Sequence[EndLabel]) -> None:
    """Write each label beside its ordinate, at the right of its diagram, moved up or down where two would
    cover each other. The diagrams are finished: their limits do not change any more."""
    figure.draw_without_rendering()  # only now it is known where an ordinate lies on the page
    points = 72 / figure.dpi
    for axes in dict.fromkeys(label.axes for label in labels):
        of_axes = sorted((label for label in labels if label.axes is axes), key=lambda label: label.ordinate)
        wanted = [axes.transData.transform((0, label.ordinate))[1] * points for label in of_axes]
        for label, place, moved in zip(of_axes, wanted, spread(wanted, _DISTANCE_POINTS), strict=True):
            axes.annotate(
                label.text,
                (1, label.ordinate),
                xycoords=("axes fraction", "data"),
                xytext=(4, moved - place),
                textcoords="offset points",
                color=label.colour,
                fontsize=_FONT_POINTS,
                verticalalignment="center",
                annotation_clip=False,
            )


def spread(places: Sequence[float], distance: float) -> list[float]:
    """The ascending `places`, moved as little as needed to be at least `distance` apart; a crowd of them
    stays around its own middle."""
    crowds: list[tuple[float, int]] = []  # places that touch: their middle, and how many they are
    for place in places:
        middle, count = place, 1
        while crowds and crowds[-1][0] + (crowds[-1][1] + count) / 2 * distance > middle:
            other, others = crowds.pop()
            middle = (other * others + middle * count) / (others + count)
            count += others
        crowds.append((middle, count))
    return [
        middle + (index - (count - 1) / 2) * distance for middle, count in crowds for index in range(count)
    ]
