"""Attention to a past and to new tokens against the plain computation, one query at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lckv.attention import past, reference
from lckv.attention.key_bias import KeyBias
from lckv.attention.past import NewTokens, Past
from lckv.attention.visibility import Visibility


def plain(
    query: Tensor, new: NewTokens, old: Past, visibility: Visibility, key_bias: KeyBias | None
) -> Tensor:
    """As the docstrings say it."""
    rows, heads, length, _ = query.shape
    group, channels = heads // new.key.shape[1], new.value.shape[-1]
    scored = channels - 1 if key_bias is not None and not key_bias.extra_channels else channels
    first_biased = 10**9 if key_bias is None else key_bias.first_biased(exclude_self=visibility.exclude_self)
    result = torch.zeros(rows, heads, length, channels)
    for row in range(rows):
        counted = [t for t in range(length) if new.counted is None or new.counted[row, t]]
        for head in range(heads):
            g = head // group
            for number, t in enumerate(counted):
                own = counted[: number if visibility.exclude_self else number + 1]
                keys, slots = [], int(old.lengths[row, g])
                for slot in range(slots):
                    behind = slots - slot + number
                    hides = [] if new.hides is None else new.hides[row, g].tolist()
                    hidden = slots - slot <= len(hides) and hides[slot - slots]
                    if not hidden or behind < first_biased:
                        keys.append((old.key[row, g, slot], old.value[row, g, slot], 0.0))
                for place, s in enumerate(own):
                    bias = float(new.key[row, g, s, -1]) if number - place >= first_biased else 0.0
                    keys.append((new.key[row, g, s], new.value[row, g, s], bias))
                if visibility.window is not None:
                    keys = keys[max(0, len(keys) - visibility.window + int(visibility.exclude_self)) :]
                if keys:
                    score = [
                        query[row, head, t, :scored] @ key[:scored] * 0.3 + bias for key, _, bias in keys
                    ]
                    result[row, head, t] = torch.stack(score).softmax(0) @ torch.stack(
                        [value for _, value, _ in keys]
                    )
    return result


@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.integers(1, 5),
    slots=st.integers(0, 5),
    exclude_self=st.booleans(),
    kind=st.sampled_from(["dense", "window", "biased"]),
    age=st.integers(1, 4),
    extra=st.sampled_from([0, 8]),
    padding=st.booleans(),
    block=st.sampled_from([1, 2, 128]),
    seed=st.integers(0, 99),
)
def test_equals_the_plain_computation(
    rows, kv_heads, group, length, slots, exclude_self, kind, age, extra, padding, block, seed
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = integers(0, slots + 1, rows, kv_heads)
    if kind == "window":  # slots are tokens there, so every head has as many
        lengths = lengths[:, :1].expand(rows, kv_heads).contiguous()
    old = Past(random(rows, kv_heads, slots, 6), random(rows, kv_heads, slots, 6), lengths)
    counted = None
    if padding:
        first, count = integers(0, length, rows), integers(0, length + 1, rows)
        place = torch.arange(length)
        counted = (place >= first[:, None]) & (place < (first + count)[:, None])
    hides, key_bias = None, None
    if kind == "biased":
        key_bias = KeyBias(age, extra)
        hides = integers(0, 2, rows, kv_heads, key_bias.age).bool()
    wide = 6 if key_bias is None else 6 + extra
    new = NewTokens(random(rows, kv_heads, length, wide), random(rows, kv_heads, length, 6), counted, hides)
    visibility = Visibility(exclude_self, int(integers(1, 5, 1)) if kind == "window" else None)
    query = random(rows, kv_heads * group, length, wide)
    output = _in_blocks(block, query, new, old, visibility, key_bias=key_bias)
    expected = plain(query, new, old, visibility, key_bias)
    places = integers(0, length, rows, int(integers(1, length + 1, 1)))
    row = torch.arange(rows)[:, None]
    some = query[row, :, places].transpose(1, 2)
    narrowed = _in_blocks(block, some, new, old, visibility, key_bias=key_bias, places=places)
    torch.testing.assert_close(narrowed, output[row, :, places].transpose(1, 2), rtol=0, atol=1e-5)
    if counted is not None:
        output = output * counted[:, None, :, None]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def _in_blocks(block: int, *args: object, **options: object) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past, "_BLOCK", block)
        return past.attend_past(*args, scale=0.3, **options)


@pytest.mark.parametrize("key_bias", [None, KeyBias(), KeyBias(age=5)], ids=str)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_without_a_past_it_is_ordinary_attention(exclude_self: bool, key_bias: KeyBias | None) -> None:
    query, key, value = torch.randn(2, 4, 300, 8), *torch.randn(2, 2, 2, 300, 8)
    nothing = Past(torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, dtype=torch.int64))
    visibility = Visibility(exclude_self)
    if key_bias is not None:
        query[..., -1] = 1 / 0.3  # brings a key's bias to its score
    found = past.attend_past(
        query, NewTokens(key, value, None, None), nothing, visibility, scale=0.3, key_bias=key_bias
    )
    expected = reference.attend(query, key, value, visibility, scale=0.3, key_bias=key_bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def many(length: int = 200, slots: int = 150, **changes: object) -> tuple[Tensor, NewTokens, Past]:
    """Queries, new tokens, and a past of 120 tokens in so many slots."""
    key, value = torch.randn(2, 2, 2, slots, 8)
    old = Past(key, value, torch.full((2, 2), 120))
    new = NewTokens(*torch.randn(2, 2, 2, length, 8), None, None)
    return torch.randn(2, 4, length, 8), new._replace(**changes), old


@pytest.mark.parametrize("exclude_self", [False, True])
def test_many_new_tokens_take_no_mask(exclude_self: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, new, old = many()
    expected = torch.cat(
        [  # few enough for a mask
            past.attend_past(
                query[:, :, start : start + 100],
                NewTokens(
                    new.key[:, :, start : start + 100], new.value[:, :, start : start + 100], None, None
                ),
                Past(
                    torch.cat((old.key[:, :, :120], new.key[:, :, :start]), 2),
                    torch.cat((old.value[:, :, :120], new.value[:, :, :start]), 2),
                    torch.full((2, 2), 120 + start),
                ),
                Visibility(exclude_self),
                scale=0.3,
            )
            for start in (0, 100)
        ],
        2,
    )
    monkeypatch.setattr(past, "_attend_block", None)
    output = past.attend_past(query, new, old, Visibility(exclude_self), scale=0.3)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert past.attend_past(query.bfloat16(), new, old, Visibility(), scale=0.3).dtype == torch.float32


@pytest.mark.parametrize("window", [None, 1, 2, 4, 9])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("slots", [0, 1, 5])
def test_one_new_token_of_an_even_past_takes_no_mask(
    slots: int, exclude_self: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, new, _ = many(1, slots)
    spare = torch.randn(2, 2, 2, slots + 1, 8)
    old = Past(*spare[:, :, :, :slots], torch.full((2, 2), slots), even=True)
    visibility = Visibility(exclude_self, window)
    expected = plain(query, new, old, visibility, None)
    monkeypatch.setattr(past, "_attend_block", None)
    for one, grad in (
        (old, False),
        (old._replace(spare=spare.unbind()), True),
        (old._replace(spare=spare.unbind()), False),
    ):
        with torch.set_grad_enabled(grad):
            output = past.attend_past(query, new, one, visibility, scale=0.3)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        is_written = one.spare is not None and not grad and not exclude_self
        assert torch.equal(spare[0, :, :, -1:], new.key) == is_written


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"counted": torch.tensor([[True], [False]])}, {}),
        ({"documents": torch.zeros(2, 1, dtype=torch.int64)}, {}),
        ({}, {"columns": past.Columns(torch.ones(2, 2, 5, dtype=torch.int64), None)}),
        ({}, {"key_bias": KeyBias()}),
    ],
    ids=["padding", "documents", "columns", "bias"],
)
def test_what_one_new_token_takes_a_mask_for(
    changes: dict, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, new, _ = many(1, 5, **changes)
    old = Past(*torch.randn(2, 2, 2, 5, 8), torch.full((2, 2), 5), even=True)
    monkeypatch.setattr(past, "_attend_one", None)
    past.attend_past(query, new, old, **{"visibility": Visibility(), "scale": 0.3, **options})


@pytest.mark.parametrize(
    ("changes", "lengths", "options"),
    [
        ({"counted": torch.ones(2, 200, dtype=torch.bool)}, None, {}),
        ({"documents": torch.zeros(2, 200, dtype=torch.int64)}, None, {}),
        ({}, torch.tensor([[120, 120], [120, 119]]), {}),
        ({}, None, {"visibility": Visibility(window=30)}),
        ({}, None, {"dropout": 0.1}),
        ({}, None, {"columns": past.Columns(torch.ones(2, 2, 150, dtype=torch.int64), None)}),
        ({}, None, {"key_bias": KeyBias()}),
    ],
    ids=["padding", "documents", "lengths", "window", "dropout", "columns", "bias"],
)
def test_what_takes_a_mask(
    changes: dict, lengths: Tensor | None, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, new, old = many(**changes)
    if lengths is not None:
        old = old._replace(lengths=lengths)
    masked: list[int] = []
    attend_block = past._attend_block
    monkeypatch.setattr(
        past, "_attend_block", lambda part, *args: masked.append(part.shape[2]) or attend_block(part, *args)
    )
    past.attend_past(query, new, old, **{"visibility": Visibility(), "scale": 0.3, **options})
    assert sum(masked) == 200


def test_blocks_get_smaller_as_the_past_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "_MASK", 2 * 2 * 100 * 3)
    sizes: list[int] = []
    attend_block = past._attend_block
    monkeypatch.setattr(
        past, "_attend_block", lambda query, *args: sizes.append(query.shape[2]) or attend_block(query, *args)
    )
    old = Past(torch.zeros(2, 2, 90, 8), torch.zeros(2, 2, 90, 8), torch.full((2, 2), 90))
    new = NewTokens(torch.zeros(2, 2, 10, 8), torch.zeros(2, 2, 10, 8), None, None)
    output = past.attend_past(torch.zeros(2, 4, 10, 8), new, old, Visibility(), scale=1.0)
    assert sizes == [3, 3, 3, 1]
    assert output.shape == (2, 4, 10, 8)


def test_half_precision_is_as_exact_as_the_fused_kernel() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    query, key, value = 3 * random(2, 4, 1, 64), random(2, 2, 512, 64), random(2, 2, 512, 64)
    old, new = (
        Past(key[:, :, :511], value[:, :, :511], torch.full((2, 2), 511)),
        NewTokens(key[:, :, 511:], value[:, :, 511:], None, None),
    )
    found = past.attend_past(query, new, old, Visibility(), scale=0.125)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(past.attend_past(query, new, old, Visibility(), scale=0.125), found)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.125)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.125
    )
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.5 * (fused - exact).norm() < 0.01 * exact.norm()


def test_under_a_window_only_slots_are_read_that_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    query, new, old = many(length=130, slots=4000)
    old = old._replace(lengths=torch.tensor([[3000, 3000], [2990, 2990]]))
    widths, attend = [], past.scaled_dot_product_attention

    def counting(query: Tensor, key: Tensor, *others: Tensor, **options: object) -> Tensor:
        widths.append(key.shape[2])
        return attend(query, key, *others, **options)

    monkeypatch.setattr(past, "scaled_dot_product_attention", counting)
    past.attend_past(query, new, old, Visibility(window=64), scale=0.3)
    assert max(widths) == 4000 - (2990 - 63) + 130
