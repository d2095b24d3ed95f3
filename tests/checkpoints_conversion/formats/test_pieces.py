"""Whole tensors from pieces."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_conversion.formats.pieces import Piece, cover, join_rows
from lckv.weights.tensors import TensorInfo


def pieces_of(whole: torch.Tensor, row_cuts: list[int], column_cuts: list[int]) -> list[Piece]:
    pieces = []
    for top, bottom in zip([0, *row_cuts], [*row_cuts, whole.shape[0]], strict=True):
        for left, right in zip([0, *column_cuts], [*column_cuts, whole.shape[1]], strict=True):
            block = whole[top:bottom, left:right].clone()

            def copy_rows(start: int, stop: int, target: torch.Tensor, block: torch.Tensor = block) -> None:
                target.copy_(block[start:stop])

            pieces.append(Piece((top, left), tuple(block.shape), copy_rows))
    return pieces


@given(data=st.data(), rows=st.integers(1, 8), columns=st.integers(1, 4))
def test_every_part_of_every_cut(data, rows, columns):
    whole = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    cuts = [data.draw(st.lists(st.integers(0, length), max_size=3).map(sorted)) for length in (rows, columns)]
    pieces = data.draw(st.permutations(pieces_of(whole, *cuts)))
    assert cover(pieces, (rows, columns))
    true_rows = data.draw(st.integers(1, rows))
    info = TensorInfo((true_rows, columns), whole.dtype)
    for start, stop in itertools.product((None, -2, *range(rows + 2)), repeat=2):
        wanted = slice(start, stop)
        assert torch.equal(join_rows(pieces, info, wanted), whole[:true_rows][wanted])
    assert torch.equal(join_rows(pieces, info, None), whole[:true_rows])


def test_pieces_that_are_missing_or_lie_outside():
    whole = torch.zeros(4, 4)
    pieces = pieces_of(whole, [2], [1])
    assert not cover(pieces[1:], (4, 4))
    assert not cover(pieces, (4, 3))
    assert not cover(pieces, (5, 4))
    assert not cover(pieces, (8, 2)), "as many numbers, but in other places"
