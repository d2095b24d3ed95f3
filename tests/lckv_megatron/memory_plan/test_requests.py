"""Requests in time: live bytes, and which are merged."""

from hypothesis import given
from hypothesis import strategies as st

from lckv_megatron.memory_plan.requests import Request, events, live_peak, merged


@st.composite
def requests(draw: st.DrawFn, most: int = 8) -> list[Request]:
    """As a program has them: every begin and every end is an event of its own."""
    number = draw(st.integers(1, most))
    times = draw(st.permutations(range(2 * number)))
    pairs = [sorted(times[2 * index : 2 * index + 2]) for index in range(number)]
    return [Request(draw(st.integers(1, 6)), start, end) for start, end in pairs]


def test_the_live_peak_is_counted_by_hand() -> None:
    assert live_peak([]) == 0
    assert live_peak([Request(5, 0, 4), Request(3, 1, 2), Request(4, 2, 3)]) == 9  # what ends, ends first


def test_events_come_in_the_order_of_time() -> None:
    first, second = Request(1, 0, 2), Request(1, 1, 3)
    assert list(events([second, first])) == [(True, first), (True, second), (False, first), (False, second)]


def test_requests_that_no_end_and_no_begin_parts_are_merged() -> None:
    first, second, later = Request(1, 0, 4), Request(2, 1, 5), Request(3, 6, 7)
    assert merged([first, second, later]) == [[first, second], [later]]
    one, after_it = Request(4, 2, 3), Request(4, 4, 5)
    first, second = Request(1, 0, 6), Request(2, 1, 7)
    assert merged([first, one, after_it, second]) == [[first, second], [one], [after_it]]


@given(requests())
def test_merging_changes_no_overlap(given_requests: list[Request]) -> None:
    groups = merged(given_requests)
    assert sorted(id(request) for group in groups for request in group) == sorted(map(id, given_requests))
    for group in groups:
        for other in given_requests:
            if other not in group:
                assert len({request.overlaps(other) for request in group}) == 1
        assert all(request.overlaps(group[0]) for request in group)
