"""Whether the inside of an index (`indexed`) can be true, in bounded memory and one pass over the file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ext.data.indexed import CHUNK, HEADER, REMEDY, IndexInfo, read_index
from megatron_ext.data.open_file import OpenFile


def check_index(prefix: str) -> IndexInfo:
    """`read_index`, and all lengths, places and boundaries of documents.

    Raises ConfigError for the first one that cannot be: a negative length, a sequence that does not begin
    where the one before it ends, boundaries that go back or outside.
    """
    info = read_index(prefix)
    remedy = f"The index is damaged: copy it again, or make it with {REMEDY}."
    index = OpenFile(Path(f"{prefix}.idx"), remedy)
    _check_sequences(index, info)
    _check_boundaries(index, info)
    return info


def _pieces(index: OpenFile, at: int, count: int, kind: str) -> Iterator[tuple[int, np.ndarray]]:
    """`count` numbers from byte `at` on, a piece at a time, each with the number of its first."""
    size = np.dtype(kind).itemsize
    for first in range(0, count, CHUNK):
        piece = min(CHUNK, count - first)
        yield first, np.frombuffer(index.read(at + first * size, piece * size), kind)


def _check_sequences(index: OpenFile, info: IndexInfo) -> None:
    count, begin = info.sequences, 0
    lengths = _pieces(index, HEADER.size, count, "<i4")
    places = _pieces(index, HEADER.size + 4 * count, count, "<i8")
    for (first, length), (_, place) in zip(lengths, places, strict=True):
        if length.min() < 0:
            number = int((length < 0).argmax())
            raise index.damaged(f"the length of sequence {first + number} is {length[number]}")
        ends = begin + np.cumsum(length, dtype=np.int64) * info.dtype.itemsize
        expected = np.concatenate([[begin], ends[:-1]])
        if (expected != place).any():
            number = int((expected != place).argmax())
            raise index.damaged(
                f"sequence {first + number} begins at byte {place[number]}, but the one before it ends at "
                f"byte {expected[number]}"
            )
        begin = int(ends[-1])


def _check_boundaries(index: OpenFile, info: IndexInfo) -> None:
    at, last = HEADER.size + 12 * info.sequences, 0
    for first, boundaries in _pieces(index, at, info.documents + 1, "<i8"):
        before = np.concatenate([[last], boundaries[:-1]])
        wrong = (boundaries < before) | (boundaries > info.sequences)
        if first == 0:
            wrong[0] = boundaries[0] != 0
        if wrong.any():
            number = int(wrong.argmax())
            raise index.damaged(
                f"document {first + number} begins at sequence {boundaries[number]}; it must be from "
                f"{before[number]} to {info.sequences}"
                + (", and 0 for the first" if first + number == 0 else "")
            )
        last = int(boundaries[-1])
    if last != info.sequences:
        raise index.damaged(f"the last document ends with sequence {last} of {info.sequences}")
