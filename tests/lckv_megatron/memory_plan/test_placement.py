"""Placements do not overlap, are as low as is said, and are the optimum where they claim to be."""

from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv_megatron.memory_plan import placement
from lckv_megatron.memory_plan.placement import Body, Placement, first_fit, place
from lckv_megatron.memory_plan.requests import Request, live_peak
from tests.lckv_megatron.memory_plan.test_requests import requests

HARD = [Request(*numbers) for numbers in (
    (3, 7, 9), (4, 0, 5), (1, 1, 4), (3, 6, 11), (3, 2, 10), (3, 3, 8),
)]  # fmt: skip
"""First fit needs 13, whichever of its orders; 12 are possible."""


def rectangles(bodies: list[Body], addresses: tuple[int, ...]) -> list[tuple[Request, int]]:
    return [
        (request, address + offset)
        for body, address in zip(bodies, addresses, strict=True)
        for request, offset in zip(body.requests, body.offsets, strict=True)
    ]


def require_sound(bodies: list[Body], placed: Placement) -> None:
    """No two requests share an address at a time; the peak is the highest address behind one."""
    lying = rectangles(bodies, placed.addresses)
    assert min(address for _, address in lying) >= 0
    for (first, low), (second, other) in combinations(lying, 2):
        apart = low + first.bytes <= other or other + second.bytes <= low
        assert apart or not first.overlaps(second)
    assert placed.peak == max(address + request.bytes for request, address in lying)
    assert live_peak(request for request, _ in lying) <= placed.bound <= placed.peak


def optimum(given_requests: list[Request]) -> int:
    """Of single requests: first fit in the order of an optimum's addresses is as low as it."""
    bodies = [*map(Body.of, given_requests)]
    tops = []
    for order in permutations(bodies):
        addresses = first_fit(order)
        tops.append(max(address + body.bytes for address, body in zip(addresses, order, strict=True)))
    return min(tops)


@settings(max_examples=30, deadline=None)
@given(requests(most=5))
def test_small_ones_are_placed_at_the_optimum(given_requests: list[Request]) -> None:
    bodies = [*map(Body.of, given_requests)]
    placed = place(bodies)
    require_sound(bodies, placed)
    assert placed.how in ("live peak reached", "integer program")
    assert placed.peak == placed.bound == optimum(given_requests)
    assert placed.gap == 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(requests(most=3), st.integers(0, 5)), min_size=1, max_size=4))
def test_bodies_keep_their_shape_and_do_not_overlap(parts: list[tuple[list[Request], int]]) -> None:
    bodies = [
        Body(tuple(members), tuple(index * (6 + space) for index in range(len(members))))
        for members, space in parts
    ]
    require_sound(bodies, place(bodies))


def test_a_hand_made_case_needs_the_program() -> None:
    bodies = [*map(Body.of, HARD)]
    placed = place(bodies)
    require_sound(bodies, placed)
    assert (placed.how, placed.peak, placed.gap) == ("integer program", 12, 0)
    assert optimum(HARD) == 12


@pytest.mark.parametrize(("limit", "value"), [("MOST_BODIES", 1), ("MOST_CONFLICTS", 1)])
def test_first_fit_stays_where_a_program_is_too_large(limit: str, value: int, monkeypatch) -> None:
    monkeypatch.setattr(placement, limit, value)
    bodies = [*map(Body.of, HARD)]
    placed = place(bodies)
    require_sound(bodies, placed)
    assert placed.how == "first fit"
    assert placed.bound == live_peak(HARD) < placed.peak
    assert placed.gap == pytest.approx(1 - placed.bound / placed.peak)


def test_first_fit_stays_where_the_time_is_up() -> None:
    bodies = [*map(Body.of, HARD)]
    placed = place(bodies, seconds=0)
    require_sound(bodies, placed)
    assert placed.how == "first fit"


def test_what_has_a_ceiling_stays_below_it() -> None:
    kept = [Body.of(Request(4, 2, 9), 7), Body.of(Request(3, 0, 8), 7)]
    bodies = [Body.of(Request(20, 1, 3)), *kept, Body.of(Request(5, 7, 10))]
    placed = place(bodies)
    require_sound(bodies, placed)
    assert sorted(placed.addresses[1:3]) in ([0, 3], [0, 4])


def test_a_body_lies_in_the_hole_of_another() -> None:
    """[0, 2) at addresses 0 and 8 leaves room for what is there then; [4, 6) at 2 does not matter."""
    shape = Body((Request(2, 0, 2), Request(2, 0, 2), Request(6, 4, 6)), (0, 8, 2))
    bodies = [shape, Body.of(Request(6, 0, 3))]
    assert first_fit(bodies) == (0, 2)
    assert place(bodies).peak == 10
    assert bodies[1].distance(shape) == 10
    assert Body.of(Request(1, 2, 4)).distance(shape) is None


def test_nothing_needs_no_memory() -> None:
    assert place([]) == Placement((), 0, 0, "live peak reached")
    assert place([]).gap == 0
