"""Which tokens of a row each context-parallel rank has."""

import pytest
import torch

from lckv.policies.config import Reach
from megatron_ext.config import ParallelConfig
from megatron_ext.parallel.chunks import Chunks, chunk_rows
from megatron_ext.parallel.process_groups import initialize
from tests.ranks import run_on_ranks

ROW = torch.arange(16)[:, None].repeat(1, 2) + torch.tensor([0, 100])
"""Two rows [s, b] of tokens 0 .. 15 and 100 .. 115."""


def test_a_rank_alone_has_whole_rows() -> None:
    alone = Chunks()
    assert alone.bounds(16) == ((0, 16),)
    assert alone.own(ROW, 0) is ROW


@pytest.mark.parametrize("ranks", [2, 4])
def test_first_and_last_chunks_belong_together(ranks: int) -> None:
    """All ranks have equally many pairs of queries and keys, and together all tokens, in `order`."""
    all_chunks = [Chunks(ranks, rank) for rank in range(ranks)]
    pairs = {sum(stop * (stop + 1) - start * (start + 1) for start, stop in c.bounds(16)) for c in all_chunks}
    assert len(pairs) == 1
    parts = torch.cat([chunks.own(ROW, 0) for chunks in all_chunks])
    assert parts[: 16 // ranks, 0].tolist() == [*range(8 // ranks), *range(16 - 8 // ranks, 16)]
    natural = torch.cat([parts.chunk(2 * ranks)[place] for place in all_chunks[0].order])
    assert torch.equal(natural, ROW)


def test_chunks_as_rows_have_the_tokens_around_them() -> None:
    rows = Chunks(2, 0).rows(ROW, Reach(before=2, after=1), outside=-1)
    assert rows.T.tolist() == [
        [-1, -1, 0, 1, 2, 3, 4],
        [-1, -1, 100, 101, 102, 103, 104],
        [10, 11, 12, 13, 14, 15, -1],
        [110, 111, 112, 113, 114, 115, -1],
    ]


def test_what_a_policy_knows_of_chunks() -> None:
    begins = torch.zeros(2, 16, dtype=torch.bool)
    begins[:, [0, 5]] = True
    counted = torch.ones_like(begins)
    counted[1, 4:8] = False
    counted[0] = False
    known = chunk_rows(Chunks(2, 1), Reach(1, 1), ROW.T, begins, counted)
    assert known.position_ids.T.tolist()[0] == [3, 4, 5, 6, 7, 8]
    assert known.counted_in_row.tolist() == [1, 12, 1, 12]
    assert known.counted is not None
    assert known.counted.T.tolist()[3] == [False, True, True, True, True, True]
    # in the second row token 8 follows padding
    assert known.begins.T.tolist()[3] == [True, True, False, False, False, False]
    assert known.begins.T.tolist()[1] == [False, False, True, True, True, True]


def test_ranks_draw_for_the_tokens_that_they_have() -> None:
    """Replicas draw the same, as in Megatron; dropout of the parts of a row is not the same."""
    replicas, parts = (run_on_ranks(2, drawn, ParallelConfig(context_parallel_size=size)) for size in (1, 2))
    assert replicas[0] == replicas[1] == parts[0] != parts[1]


def drawn(parallel: ParallelConfig) -> float:
    initialize(parallel, seed=1)
    return torch.rand(()).item()
