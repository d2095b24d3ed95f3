"""Conversations into rows of equal length, none of them in two rows."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribute items of `lengths` (int [n], each 1 .. capacity) over rows that take `capacity` each.

    The longest come first, in the given order among equals; each goes to the row with the least space that
    takes it, or to a new one. That fills rows as well as is known to be possible in one pass. Returns the
    items row by row, int64 [n], and where in them each row begins, and n, int64 [rows + 1].

    Rows are found by their space through the bits of one number, so that an item takes about a microsecond,
    whatever the number of rows.
    """
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    order = np.argsort(-lengths, kind="stable")
    shortest = int(lengths.min())
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by their space
    spaces = 0  # bit s: a row of space s is open
    rows = 0
    row_of = np.empty(len(lengths), np.int64)
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        row_of[item] = row
        if (left := space - length) >= shortest:
            open_rows[left].append(row)
            spaces |= 1 << left
    items = order[np.argsort(row_of[order], kind="stable")]
    return items, np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
