"""Masks, positions and packed sequences of Hugging Face, read."""

from typing import Any

import pytest
import torch

from lckv.models.cache import CACHE_NAME, LCKVCache
from lckv.models.packing import Packing
from lckv.models.tokens import Given, Layout, documents_of, positions
from lckv.policies.dense.config import DenseConfig
from tests.lckv.models.tiny import MERGING, PLAIN, model

DENSE, MERGES = DenseConfig().build(), MERGING.build()


def bools(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def layout(
    mask: torch.Tensor | None,
    tokens: int,
    *,
    cache: LCKVCache | None = None,
    policy: Any = DENSE,
    training: bool = False,
    position_ids: torch.Tensor | None = None,
    **packing: Any,
) -> Layout:
    given = Given(mask, position_ids, Packing(**packing))
    slots = None if cache is None else cache.slots
    return given.layout(torch.zeros(2, tokens, 1), slots, policy, training=training)


def filled(mask: torch.Tensor | None, columns: int) -> LCKVCache:
    with torch.no_grad():
        return model(PLAIN)(torch.ones(2, columns, dtype=torch.int64), attention_mask=mask).past_key_values


def test_no_padding_is_nothing_to_say() -> None:
    assert layout(None, 3) == Layout()
    assert layout(bools("111", "111").long(), 3) == Layout()
    assert layout(bools("11111", "11111"), 2, cache=filled(None, 3)) == Layout()


@pytest.mark.parametrize(("policy", "training"), [(DENSE, True), (MERGES, False), (MERGES, True)])
def test_padding_before_and_behind_tokens_splits_rows(policy: Any, training: bool) -> None:
    found = layout(bools("0011", "1110").long(), 4, policy=policy, training=training)
    assert torch.equal(found.counted, bools("0011", "1110"))
    assert found.documents.cu_seqlens.tolist() == [0, 2, 4, 8]
    assert not found.masked


def test_dense_models_mask_what_splitting_does_not_hide() -> None:
    assert not layout(bools("0011", "0111"), 4).masked
    assert layout(bools("0011", "1110"), 4).masked  # whose last query is where `generate` goes on
    for training in (True, False):
        found = layout(bools("1011", "1111"), 4, training=training)
        assert found.masked
        assert torch.equal(found.counted, bools("1011", "1111"))
        assert found.documents is None
    positions = torch.tensor([[0, 0, 1, 0], [0, 1, 2, 3]])
    found = layout(bools("1011", "1111"), 4, position_ids=positions)
    assert found.document.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1]]


def test_what_the_cache_holds() -> None:
    cache = filled(bools("011", "111"), 3)
    assert torch.equal(cache.slots.counted, bools("011", "111"))
    found = layout(bools("01111", "11101"), 2, cache=cache)
    assert torch.equal(found.counted, bools("11", "01"))
    assert found.shown is None
    found = layout(bools("00111", "11111"), 2, cache=cache)
    assert found.counted is None
    assert torch.equal(found.shown, bools("001", "111"))


@pytest.mark.parametrize(
    ("mask", "tokens", "options", "message"),
    [
        (torch.ones(2, 1, 3, 3), 3, {}, r"attention_mask has shape \[2, 1, 3, 3\]; it must be \[2, 3\]"),
        ({"full_attention": None}, 3, {}, r"attention_mask is a dict; it must be \[2, 3\]"),
        (torch.ones(2, 4), 3, {}, r"\[2, 4\]; it must be \[2, 3\], .* for 0 earlier columns and 3 new"),
        (torch.ones(2, 3), 3, {"cache": 2}, r"\[2, 3\]; it must be \[2, 5\], .* for 2 earlier columns and 3"),
        (torch.ones(1, 3), 3, {}, r"attention_mask has shape \[1, 3\]; it must be \[2, 3\]"),
        (torch.full((2, 3), -1e9), 3, {}, "attention_mask has the value -1e\\+09; it must be"),
        (
            bools("0110", "1101"),
            4,
            {"policy": MERGES},
            "attention_mask: row 1 has padding between its tokens; the KV policy dmc merges .* put padding",
        ),
        (
            bools("1011", "1111"),
            1,
            {"cache": 3, "policy": MERGES},
            f"attention_mask hides column 1 of row 0, which {CACHE_NAME} holds; the KV policy dmc .* give 1",
        ),
        (
            bools("1111", "1111"),
            1,
            {"cache": bools("111", "011")},
            "attention_mask shows column 0 of row 1, which was padding when it came, .* give 0 there",
        ),
        (
            bools("11111", "11111"),
            2,
            {"cache": 3, "position_ids": torch.tensor([[3, 4], [3, 0]])},
            "position_ids: column 1 of row 1 of the new tokens begins another sequence .* hide them",
        ),
        (
            None,
            2,
            {"cache": 3, "position_ids": torch.tensor([[0, 1]])},
            "position_ids: column 0 of row 0 of the new tokens begins another sequence",
        ),
        (
            None,
            2,
            {"cache": 3, "seq_idx": torch.zeros(2, 2)},
            f"seq_idx is given with {CACHE_NAME}, which holds 3 columns; packed sequences begin in a batch",
        ),
        (None, 3, {"position_ids": torch.zeros(3, 2, 3)}, r"position_ids has shape \[3, 2, 3\]; it must"),
        (None, 3, {"max_length_q": 3}, "max_length_q is 3, but no sequence boundaries are given; give"),
        (None, 3, {"cu_seq_lens_k": torch.tensor([0, 3])}, r"cu_seq_lens_k is \[0, 3\]; .* from 0 to 6"),
        (None, 3, {"cu_seq_lens_q": torch.tensor([0, 2, 6])}, "every row must begin a sequence"),
        (None, 3, {"cu_seq_lens_q": torch.tensor([0, 3, 3, 6])}, "it must rise from 0 to 6"),
        (
            None,
            3,
            {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "max_length_q": 2},
            "max_length_q is 2, but cu_seq_lens_q has a sequence of 3 tokens; give the length of the longest",
        ),
        (
            None,
            3,
            {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "cu_seq_lens_k": torch.tensor([0, 1, 3, 6])},
            "cu_seq_lens_k and cu_seq_lens_q say otherwise where sequences begin",
        ),
        (None, 3, {"seq_idx": torch.zeros(2, 4)}, r"seq_idx has shape \[2, 4\]; it must be \[2, 3\]"),
        (
            None,
            3,
            {"seq_idx": torch.zeros(2, 3), "position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]])},
            "position_ids: row 0 restarts from 0 at column 2, where seq_idx lets no sequence begin",
        ),
    ],
)  # fmt: skip
def test_contradictions(mask: Any, tokens: int, options: dict[str, Any], message: str) -> None:
    cache = options.get("cache")
    if cache is not None:
        cache = filled(None, cache) if isinstance(cache, int) else filled(cache, cache.shape[1])
    with pytest.raises(ValueError, match=message):
        layout(mask, tokens, **{**options, "cache": cache})


def test_a_sequence_may_begin_where_the_cache_is_hidden() -> None:
    cache = filled(None, 2)
    found = layout(bools("0011", "0011"), 2, cache=cache, position_ids=torch.tensor([[0, 1], [0, 1]]))
    assert torch.equal(found.shown, bools("00", "00"))


def test_packed_sequences() -> None:
    lengths = {"cu_seq_lens_q": torch.tensor([0, 1, 3, 6]), "max_length_q": 3}
    for packing in ({"seq_idx": torch.tensor([[4, 5, 5], [6, 6, 6]])}, lengths):
        assert layout(None, 3, **packing).documents.cu_seqlens.tolist() == [0, 1, 3, 6]


def test_documents() -> None:
    def bounds(counted: torch.Tensor | None, position_ids: torch.Tensor | None) -> list[int]:
        documents = documents_of(counted, None if position_ids is None else position_ids == 0)
        return [] if documents is None else documents.cu_seqlens.tolist()

    assert bounds(None, None) == []
    assert bounds(bools("1110", "1111"), None) == []  # nobody looks back at padding behind tokens
    assert bounds(bools("0011", "1110"), None) == [0, 2, 4, 8]
    restarting = torch.tensor([[0, 1, 0, 1], [2, 3, 4, 5]])
    assert bounds(None, restarting) == [0, 2, 4, 8]
    assert bounds(None, torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])) == []
    assert bounds(bools("1111", "0110"), torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]])) == [0, 2, 4, 5, 8]
    assert documents_of(None, restarting == 0).cu_seqlens.dtype == torch.int32


def test_positions() -> None:
    device = torch.device("cpu")
    assert positions(None, None, 2, 3, device).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert positions(None, torch.tensor([4, 0]), 2, 2, device).tolist() == [[4, 5], [0, 1]]
    counted = bools("0011", "1100")
    assert positions(counted, None, 2, 4, device).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert positions(counted, torch.tensor([7, 2]), 2, 4, device).tolist() == [[7, 7, 7, 8], [2, 3, 3, 3]]


def test_positions_that_nobody_gave_are_columns() -> None:
    new, given = torch.zeros(2, 4, 1), Given(None, None, Packing())
    assert given.positions(new, None, None).tolist() == [[0, 1, 2, 3]]
    assert given.positions(new, bools("0010", "1011"), None).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    slots = filled(bools("011", "111"), 3).slots
    assert given.positions(new[:, :2], None, slots).tolist() == [[2, 3], [3, 4]]
    assert given.positions(new[:, :2], bools("01", "11"), filled(None, 3).slots).tolist() == [[3, 4]] * 2


def test_positions_in_packed_sequences() -> None:
    given = Given(None, None, Packing(seq_idx=torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])))
    assert given.positions(torch.zeros(2, 4, 1), None, None).tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
