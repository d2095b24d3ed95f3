"""Tables of pages grow and shrink: every page has one owner, and heads own what their slots need."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.cache.page_tables import PageTables
from lckv.cache.pool import PagePool

LAYERS, HEADS, SEQUENCES = 2, 2, 3

changes = st.lists(
    st.tuples(
        st.lists(st.integers(0, SEQUENCES - 1), min_size=1, max_size=SEQUENCES, unique=True),
        st.lists(
            st.integers(0, 23), min_size=LAYERS * HEADS * SEQUENCES, max_size=LAYERS * HEADS * SEQUENCES
        ),
    ),
    max_size=8,
)


@given(changes=changes, page_size=st.integers(1, 4), window=st.none() | st.integers(1, 9))
def test_any_lengths_may_follow_any_lengths(changes, page_size, window):
    pool = PagePool(LAYERS * HEADS * SEQUENCES * 24, page_size, 4, torch.float32, torch.device("cpu"))
    tables = PageTables([None, window], pool, sequences=SEQUENCES, heads=HEADS, columns=24)
    for rows, numbers in changes:
        sequences = np.array(rows)
        lengths = np.array(numbers).reshape(LAYERS, SEQUENCES, HEADS)[:, : len(rows)]
        lost = tables.loses(sequences, lengths)
        assert not lost[0]
        if lost.any():
            assert window is not None and (lengths[1] < tables.lengths[1, sequences]).any()
            continue
        growth, free = tables.growth(sequences, lengths), pool.free
        tables.apply(growth)
        assert free - pool.free == growth.pages
        assert np.array_equal(tables.lengths[:, sequences], lengths)
        owned = tables.table.numpy()
        assert sorted([*owned[owned > 0], *pool._free_list[: pool.free]]) == list(range(1, pool.pages + 1))
        for layer, kept in ((0, 10**6), (1, 10**6 if window is None else max(1, window - 1))):
            for place in np.ndindex(SEQUENCES, HEADS):
                length = tables.lengths[(layer, *place)]
                needed = {slot // page_size for slot in range(max(0, length - kept), length)}
                assert set(np.flatnonzero(owned[(layer, *place)])) == needed
    for sequence in range(SEQUENCES):
        tables.release(sequence)
    assert pool.free == pool.pages and not tables.table.any()
