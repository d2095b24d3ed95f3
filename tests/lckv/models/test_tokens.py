"""Masks and positions of Hugging Face, read."""

import pytest
import torch

from lckv.models.tokens import counted_tokens, documents_of, positions


def bools(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def test_counted_tokens() -> None:
    assert counted_tokens(None, 3, 0) is None
    assert counted_tokens(bools("111", "111").long(), 3, 0) is None
    assert torch.equal(counted_tokens(bools("0011", "1110").long(), 4, 0), bools("0011", "1110"))
    assert counted_tokens(bools("0011", "1011"), 2, 2) is None  # only new tokens matter
    assert torch.equal(counted_tokens(bools("0011", "0000"), 2, 2), bools("11", "00"))


@pytest.mark.parametrize(
    ("mask", "older", "shape"),
    [(torch.ones(2, 1, 3, 3), 0, r"\[2, 1, 3, 3\]; it must be \[batch, 3\]"),
     (torch.ones(2, 4), 0, r"\[2, 4\]; it must be \[batch, 3\], .* for 0 earlier columns and 3 new"),
     (torch.ones(2, 3), 2, r"\[2, 3\]; it must be \[batch, 5\], .* for 2 earlier columns and 3 new")],
)  # fmt: skip
def test_masks_of_another_shape(mask: torch.Tensor, older: int, shape: str) -> None:
    with pytest.raises(ValueError, match=f"attention_mask has shape {shape}"):
        counted_tokens(mask, 3, older)


def test_padding_between_tokens() -> None:
    with pytest.raises(ValueError, match="attention_mask: row 1 has padding between its tokens"):
        counted_tokens(bools("0110", "1101"), 4, 0)
    assert (
        counted_tokens(bools("0110", "1001"), 1, 3) is not None
    )  # between those of two calls it means nothing


def test_documents() -> None:
    def bounds(*args: torch.Tensor | None) -> list[int]:
        documents = documents_of(*args)
        return [] if documents is None else documents.cu_seqlens.tolist()

    assert bounds(None, None) == []
    assert bounds(bools("1110", "1111"), None) == []  # nobody looks back at padding behind tokens
    assert bounds(bools("0011", "1110"), None) == [0, 2, 4, 8]
    restarting = torch.tensor([[0, 1, 0, 1], [2, 3, 4, 5]])
    assert bounds(None, restarting) == [0, 2, 4, 8]
    assert bounds(None, torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])) == []
    assert bounds(bools("1111", "0110"), torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]])) == [0, 2, 4, 5, 8]
    assert documents_of(None, restarting).cu_seqlens.dtype == torch.int32


def test_positions() -> None:
    device = torch.device("cpu")
    assert positions(None, None, 2, 3, device).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert positions(None, torch.tensor([4, 0]), 2, 2, device).tolist() == [[4, 5], [0, 1]]
    counted = bools("0011", "1100")
    assert positions(counted, None, 2, 4, device).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert positions(counted, torch.tensor([7, 2]), 2, 4, device).tolist() == [[7, 7, 7, 8], [2, 3, 3, 3]]
