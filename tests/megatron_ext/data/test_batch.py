from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.policies.config import Reach
from megatron_ext.config import DataConfig
from megatron_ext.data.batch import make_batch
from megatron_ext.errors import ConfigError
from megatron_ext.parallel.chunks import Chunks

EOD = 0


def samples_of(rows: list[list[int]]) -> dict[str, Tensor]:
    text = torch.tensor(rows)
    return {"tokens": text[:, :-1], "labels": text[:, 1:]}


@st.composite
def rows(draw: st.DrawFn) -> list[list[int]]:
    width = draw(st.integers(2, 12))
    return draw(st.lists(st.lists(st.integers(0, 3), min_size=width, max_size=width), min_size=1, max_size=3))


@given(rows(), st.booleans(), st.booleans(), st.booleans())
def test_masks_and_positions_are_megatrons(
    text: list[list[int]], mask_eod: bool, positions: bool, attention: bool
) -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    data = DataConfig(eod_mask_loss=mask_eod, reset_position_ids=positions, reset_attention_mask=attention)
    samples = samples_of(text)
    batch = make_batch(samples, data, EOD, "cpu")
    for row, tokens in enumerate(samples["tokens"]):
        hidden, loss_mask, position_ids = _get_ltor_masks_and_position_ids(
            tokens, EOD, positions, attention, mask_eod, create_attention_mask=True
        )
        assert torch.equal(batch.loss_mask[row], loss_mask)
        assert torch.equal(batch.position_ids[row], position_ids)
        if batch.cu_seqlens is not None:
            width = tokens.numel()
            begins = torch.zeros(batch.tokens.numel() + 1, dtype=torch.int64)
            begins[batch.cu_seqlens.long()] = 1
            document = begins.cumsum(0)[row * width : (row + 1) * width]
            visible = (document[:, None] == document[None, :]).tril()
            assert torch.equal(~visible, hidden[0])
    assert (batch.cu_seqlens is not None) == attention
    if batch.cu_seqlens is not None:
        bounds = batch.cu_seqlens.tolist()
        width = samples["tokens"].shape[1]
        assert bounds == sorted(set(bounds))
        assert {row * width for row in range(len(text) + 1)} <= set(bounds)


def test_types_and_values() -> None:
    data = DataConfig(eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    batch = make_batch(samples_of([[5, EOD, 7, 8, 9], [EOD, 2, 3, EOD, 4]]), data, EOD, torch.device("cpu"))
    assert batch.tokens.tolist() == [[5, EOD, 7, 8], [EOD, 2, 3, EOD]]
    assert batch.labels.tolist() == [[EOD, 7, 8, 9], [2, 3, EOD, 4]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 1], [0, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5, 8]
    types = [
        batch.tokens.dtype,
        batch.labels.dtype,
        batch.loss_mask.dtype,
        batch.position_ids.dtype,
        batch.cu_seqlens.dtype,
    ]
    assert types == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32]
    assert all(tensor.is_contiguous() for tensor in (batch.loss_mask, batch.position_ids))


def test_without_resets_the_end_of_a_document_means_nothing() -> None:
    for eod in (EOD, None):
        batch = make_batch(samples_of([[5, EOD, 7, 8]]), DataConfig(), eod, "cpu")
        assert batch.loss_mask.tolist() == [[1, 1, 1]]
        assert batch.position_ids.tolist() == [[0, 1, 2]]
        assert batch.cu_seqlens is None


def test_padding_has_no_loss() -> None:
    batch = make_batch(samples_of([[5, 6, -1, -1]]), DataConfig(), EOD, "cpu")
    assert batch.tokens.tolist() == [[5, 6, 0]]
    assert batch.labels.tolist() == [[6, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("setting", ["eod_mask_loss", "reset_position_ids", "reset_attention_mask"])
def test_settings_that_need_an_end_of_document(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{setting}=true needs to know the end-of-document token"):
        make_batch(samples_of([[1, 2]]), DataConfig(**{setting: True}), None, "cpu")


def test_a_context_parallel_rank_has_its_part_of_the_whole() -> None:
    """Masks, positions and documents are those of whole rows, cut."""
    data = DataConfig(eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
    samples = samples_of([[1, 2, 0, 3, 4, 5, 6, 0, 8], [1, 2, 3, 4, 5, -1, -1, -1, -1]])
    whole = make_batch(samples, data, EOD, "cpu")
    ranks = [make_batch(samples, data, EOD, "cpu", Chunks(2, rank), Reach(1, 0)) for rank in range(2)]
    assert ranks[0].position_ids.tolist()[0] == [0, 1, 3, 4]
    assert ranks[1].position_ids.tolist()[0] == [2, 0, 1, 2]
    for field in fields(whole):
        expected, parts = getattr(whole, field.name), [getattr(batch, field.name) for batch in ranks]
        if field.name in ("cu_seqlens", "sample_ids"):
            assert str(parts[0]) == str(parts[1]) == str(expected)
        elif field.name != "chunk_rows":
            first, last = (part.chunk(2, 1) for part in parts)
            assert torch.equal(torch.cat((first[0], *last, first[1]), 1), expected), field.name
    known = ranks[0].chunk_rows
    assert known is not None and whole.chunk_rows is None
    # one token in front and two own: of the first chunks of both rows, then of the last chunks
    assert known.position_ids.T.tolist() == [[0, 0, 1], [0, 0, 1], [2, 3, 4], [5, 6, 7]]
    assert known.begins.T.tolist() == [[True, True, False]] * 2 + [[False] * 3, [False, True, True]]
