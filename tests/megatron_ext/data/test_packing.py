import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.packing import pack

CAPACITY = 12


def rows_of(lengths: list[int]) -> list[list[int]]:
    items, bounds = pack(np.array(lengths, np.int64), CAPACITY)
    return [row.tolist() for row in np.split(items, bounds[1:-1])] if lengths else []


@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_every_item_is_in_one_row_that_has_room_for_it(lengths: list[int]) -> None:
    rows = rows_of(lengths)
    assert sorted(item for row in rows for item in row) == [*range(len(lengths))]
    assert all(0 < sum(lengths[item] for item in row) <= CAPACITY for row in rows)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60))
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    filled = sorted(sum(lengths[item] for item in row) for row in rows_of(lengths))
    assert len(filled) == 1 or sum(filled[:2]) > CAPACITY


def naive(lengths: list[int]) -> list[list[int]]:
    """Best fit of the longest first, in words."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        spaces = [CAPACITY - sum(lengths[other] for other in row) for row in rows]
        fitting = [space for space in spaces if space >= lengths[item]]
        if fitting:
            rows[spaces.index(min(fitting))].append(item)
        else:
            rows.append([item])
    return rows


@given(st.lists(st.integers(1, CAPACITY), max_size=40))
def test_as_many_rows_as_best_fit_takes(lengths: list[int]) -> None:
    assert len(rows_of(lengths)) == len(naive(lengths))


def test_many_items_fill_rows() -> None:
    """A hundred thousand in a second or so; quadratic work would take hours."""
    lengths = np.random.default_rng(1).integers(1, 2000, 100_000)
    _, bounds = pack(lengths, 2048)
    assert lengths.sum() > 0.99 * 2048 * (len(bounds) - 1)
