"""Smoothed curves: they stay among their points, and where they should be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv_megatron.pictures.smoothing import exponential, trend

ORDINATES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan))


@given(ORDINATES, st.floats(0, 0.99))
def test_an_average_stays_between_the_values_and_starts_at_the_first(ordinates, smoothing):
    smoothed = exponential(ordinates, smoothing)
    stays_between(ordinates, smoothed)
    finite = [value for value in ordinates if not math.isnan(value)]
    if finite:
        assert next(value for value in smoothed if not math.isnan(value)) == pytest.approx(finite[0])


@given(ORDINATES)
def test_a_trend_stays_between_the_values(ordinates):
    stays_between(ordinates, trend(ordinates))


def stays_between(ordinates, smoothed):
    assert [math.isnan(value) for value in smoothed] == [math.isnan(value) for value in ordinates]
    finite = [value for value in ordinates if not math.isnan(value)]
    seen = [value for value in smoothed if not math.isnan(value)]
    if finite:
        assert min(finite) - 1e-3 <= min(seen)
        assert max(seen) <= max(finite) + 1e-3


def test_an_average_is_a_weighted_mean_of_the_past():
    assert exponential([1.0, 4.0], 0.5) == [1.0, pytest.approx((0.5 * 1 + 1 * 4) / 1.5)]
    assert exponential([1.0, 4.0], 0.0) == [1.0, 4.0]


def test_a_trend_does_not_stay_behind_and_is_quieter_than_the_points():
    straight = [7 - 0.01 * place for place in range(500)]
    assert trend(straight) == pytest.approx(straight)
    noisy = [value + (-1) ** place for place, value in enumerate(straight)]
    noisy[40] = math.nan
    smoothed = trend(noisy)
    assert math.isnan(smoothed[40])
    off = [abs(one - other) for one, other in zip(smoothed, straight, strict=True) if not math.isnan(one)]
    assert max(off[20:-20]) < 0.15 and max(off) < 0.5
