"""How many passes each step has."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lckv.sharing.pass_schedule import forward_passes_at


def passes(schedule, least: int, most: int, iterations: int, seed: int = 1) -> list[int]:
    return [
        forward_passes_at(schedule, least, most, iteration=number, iterations=iterations, seed=seed)
        for number in range(iterations)
    ]


@given(st.integers(0, 5), st.integers(0, 6), st.integers(1, 60))
def test_linear_schedules(least: int, more: int, iterations: int) -> None:
    rising = passes("rising", least, least + more, iterations)
    assert rising[0] == least
    assert rising == sorted(rising)
    assert max(rising) <= least + more
    if iterations > more:
        counts = Counter(rising)
        assert set(counts) == set(range(least, least + more + 1))
        assert max(counts.values()) - min(counts.values()) <= 1
    falling = passes("falling", least, least + more, iterations)
    sums = {one + other for one, other in zip(rising, falling, strict=True)}
    assert sums == {2 * least + more}
    assert passes("constant", least, least + more, iterations) == [least + more] * iterations


def test_random_numbers_are_those_of_seed_and_iteration() -> None:
    drawn = passes("random", 1, 3, 600)
    assert drawn == passes("random", 1, 3, 600)
    assert drawn != passes("random", 1, 3, 600, seed=2)
    # nothing but the iteration counts: a run that was to be longer draws the same
    assert drawn[:100] == passes("random", 1, 3, 1000)[:100]
    counts = Counter(drawn)
    assert set(counts) == {1, 2, 3}
    assert all(abs(count - 200) < 50 for count in counts.values())
    assert drawn[:8] == [2, 2, 1, 1, 1, 3, 1, 3], "other versions draw the same"
