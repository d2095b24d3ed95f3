"""Which rows of a tensor are computed again."""

import pytest
import torch

from megatron_ext.offload.tokens import Split, Tokens

FOUR = Tokens(count=4, batch=3, shards=2, head=1)


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((4, 3, 5), Split(1, 4, 1)),
        ((8, 3, 2, 5), Split(2, 4, 1)),
        ((12, 5), Split(1, 12, 3)),
        ((24,), Split(2, 12, 3)),
        ((4, 5), None),
        ((5, 4, 3), None),
        ((), None),
    ],
    ids=str,
)
def test_split(shape: tuple[int, ...], split: Split | None) -> None:
    assert FOUR.split(shape) == split


def test_head_and_tail_of_each_shard() -> None:
    tensor = torch.arange(8)[:, None].expand(8, 3)
    split = FOUR.split(tensor.shape)
    assert split is not None
    assert split.head_of(tensor)[..., 0].tolist() == [[0], [4]]
    assert split.tail_of(tensor)[..., 0].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert FOUR.tail(tensor)[:, 0].tolist() == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(("share", "head"), [(0.0, 0), (0.5, 5), (0.96, 10), (1.0, 10)])
def test_share_of_tokens(share: float, head: int) -> None:
    tokens = Tokens.of(torch.zeros(10, 2, 7), shards=1, share=share)
    assert (tokens.count, tokens.batch, tokens.head) == (10, 2, head)
    assert tokens.all_on_host == (head == 10)
