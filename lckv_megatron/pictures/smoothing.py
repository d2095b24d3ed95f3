"""Curves without their noise."""

import math
from collections.abc import Sequence

import numpy as np

FEWEST_POINTS = 100
"""A curve of fewer is drawn as it is, where nobody says otherwise."""
_SHARE = 1 / 50
"""Of a curve, on either side of a point: what its trend is taken of."""


def exponential(ordinates: Sequence[float], smoothing: float) -> list[float]:
    """Exponential moving average, without the pull towards 0 at its start;
    nan stays nan and is not averaged in. Where a curve falls, it stays behind."""
    average = weight = 0.0
    smoothed = []
    for ordinate in ordinates:
        if not math.isnan(ordinate):
            average = smoothing * average + (1 - smoothing) * ordinate
            weight = smoothing * weight + (1 - smoothing)
        smoothed.append(math.nan if math.isnan(ordinate) else average / weight)
    return smoothed


def trend(ordinates: Sequence[float]) -> list[float]:
    """At each point the straight line through its neighbours, by least squares, within the range of the
    ordinates. It does not stay behind, at the ends of the curve neither. nan stays nan and takes no part."""
    given = np.asarray(ordinates, dtype=float)
    known = np.isfinite(given)
    if not known.any():
        return list(ordinates)
    places, half = np.arange(len(given)), max(1, round(len(given) * _SHARE))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(given))
    middle = given[known].mean()
    values = np.where(known, given - middle, 0.0)

    def sums(terms: np.ndarray) -> np.ndarray:
        """Over the neighbours of each place, itself included."""
        up_to = np.concatenate([[0.0], np.cumsum(terms)])
        return up_to[last] - up_to[first]

    count, of_values = sums(known), sums(values)
    of_places = sums(known * places) - places * count  # distances from the place itself
    of_squares = sums(known * places**2) - 2 * places * sums(known * places) + places**2 * count
    of_products = sums(values * places) - places * of_values
    spread = count * of_squares - of_places**2
    with np.errstate(divide="ignore", invalid="ignore"):
        line = (of_squares * of_values - of_places * of_products) / spread
        heights = np.where(spread > 0, line, of_values / count) + middle
    clipped = np.clip(heights, given[known].min(), given[known].max())
    return np.where(known, clipped, given).tolist()
