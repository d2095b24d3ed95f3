"""Which cases of a table are left for the night."""

from tests.thinning import thinned


def test_each_third_case_is_run_every_time() -> None:
    cases = thinned([("a", 1), ("b", 2), ("c", 3), ("d", 4)], 3)
    assert [case.values for case in cases] == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["nightly"], ["nightly"], []]


def test_a_case_may_be_one_value() -> None:
    first, second = thinned({"a": 1, "b": 2}, 2)
    assert (first.values, second.values) == (("a",), ("b",))
