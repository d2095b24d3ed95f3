"""Caches of policies that drop tokens late, whatever pieces tokens come in, against plain lists of them: the
newest tokens are a ring in front of the others, and one more token writes two slots at most."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lckv.attention import pages as attention_pages
from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.attention.visibility import Visibility
from lckv.cache import paged_writing
from lckv.cache.base import KVCache
from lckv.cache.contiguous import ContiguousCache
from lckv.cache.edits import edit_of
from lckv.cache.paged import PagedCache
from lckv.cache.undecided import UndecidedCache
from lckv.policies.base import Extension
from lckv.policies.config import Traits

ROWS, HEADS, GROUP, CHANNELS, EXTRA, LONGEST = 2, 2, 2, 4, 8, 60


class Late:
    """A KV policy as caches see it, which drops tokens that are `age` old."""

    name = "late"

    def __init__(self, age: int) -> None:
        self.traits = Traits(KeyBias(age, EXTRA), windows=False)

    def extend(self, state: None, key: Tensor, value: Tensor, read: None, context: object) -> Extension:
        return Extension(key, value)


class Came(NamedTuple):
    """New tokens, and padding between them."""

    extension: Extension
    counted: Tensor | None
    query: Tensor
    tokens: list[list[tuple[int, int]]]
    """Of each row: the numbers of its new tokens in the text, and their columns."""


class Text:
    """Rows of random tokens, of which each head is to drop some."""

    def __init__(self, age: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.age = age
        shape = LONGEST, ROWS, HEADS
        self.key, self.value = torch.randn(2, *shape, CHANNELS, generator=generator)
        self.query = torch.randn(LONGEST, ROWS, HEADS * GROUP, CHANNELS, generator=generator)
        self.drops = torch.rand(shape, generator=generator) < 0.6
        self.anything = torch.rand(age, *shape[1:], generator=generator) < 0.5

    def after(self, used: Sequence[int], counts: Sequence[int], before: Sequence[int]) -> Came:
        """The next `counts` tokens of rows that have `used`, behind so many columns of padding."""
        width = max(1, *(count + start for count, start in zip(counts, before, strict=True)))
        key, value = torch.full((2, width, ROWS, HEADS, CHANNELS), 9.0)  # of padding, which would show
        query, bias = torch.zeros(width, ROWS, HEADS * GROUP, CHANNELS), torch.zeros(width, ROWS, HEADS)
        counted, tokens = torch.zeros(ROWS, width, dtype=torch.bool), []
        # Of tokens that there are not it does not matter what is said.
        hides = self.anything.clone()
        for row, (start, count, column) in enumerate(zip(used, counts, before, strict=True)):
            new, columns = slice(start, start + count), slice(column, column + count)
            for part, whole in ((key, self.key), (value, self.value), (query, self.query)):
                part[columns, row] = whole[new, row]
            bias[columns, row] = self.drops[new, row] * HIDDEN
            counted[row, columns] = True
            known = min(start, self.age)
            hides[self.age - known :, row] = self.drops[start - known : start, row]
            tokens.append([(start + number, column + number) for number in range(count)])
        wide = torch.zeros(*key.shape[:3], EXTRA)
        wide[..., -1] = bias
        extension = Extension(torch.cat((key, wide), -1), value, hides)
        wide = torch.zeros(*query.shape[:3], EXTRA)
        query = torch.cat((query, wide), -1).permute(1, 2, 0, 3)
        return Came(extension, None if counted.all() else counted, query, tokens)

    def attended(self, row: int, token: int, *, exclude_self: bool) -> Tensor:
        """[h, d] of one token: it sees those that are not dropped, and those that are not old enough."""
        outputs = []
        for head in range(HEADS * GROUP):
            g = head // GROUP
            seen = [
                other
                for other in range(token + 1 - exclude_self)
                if not self.drops[other, row, g] or token - other < self.age + exclude_self
            ]
            scores = self.key[seen, row, g] @ self.query[token, row, head]
            outputs.append(scores.softmax(0) @ self.value[seen, row, g] if seen else torch.zeros(CHANNELS))
        return torch.stack(outputs)

    def slots(self, row: int, head: int, tokens: int) -> list[int]:
        """Tokens in the order of the slots of a head, of a row that has so many."""
        newest = range(max(0, tokens - self.age), tokens)
        ring = sorted(newest, key=lambda token: token % self.age)
        return [*ring, *(token for token in range(newest.start) if not self.drops[token, row, head])]


def check_slots(text: Text, used: Sequence[int], lengths: Tensor, slots: Sequence[Sequence[Tensor]]) -> None:
    """`slots`: keys [n, d] of each row and head, and more that are not in use."""
    for row, tokens in enumerate(used):
        for head in range(HEADS):
            expected = text.slots(row, head, tokens)
            assert lengths[row, head] == len(expected)
            assert torch.equal(slots[row][head][: len(expected)], text.key[expected, row, head])


def contiguous(age: int) -> ContiguousCache:
    return ContiguousCache([0], Late(age), {})


def paged(age: int, page_size: int, pages: int = 300) -> PagedCache:
    return PagedCache(
        layers=[0], policy=Late(age), windows={}, kv_heads=HEADS, head_dim=CHANNELS, dtype=torch.float32,
        device="cpu", pages=pages, page_size=page_size, max_sequences=ROWS + 1, max_tokens=LONGEST,
    )  # fmt: skip


def check_contiguous(text: Text, used: Sequence[int], cache: ContiguousCache) -> None:
    check_slots(text, used, cache.lengths(0), cache._layers[0].past.key)


def check_paged(text: Text, used: Sequence[int], cache: PagedCache, sequences: Sequence[int]) -> None:
    memory = cache._memory
    table = memory.tables.table[0, sequences].long()
    check_slots(text, used, memory.lengths[0, sequences], memory.pool.key[table].flatten(2, 3))
    assert torch.equal(torch.from_numpy(memory.tables.lengths), memory.lengths)
    assert not memory.pool.key[0].any() and not memory.pool.value[0].any()


def check_attention(text: Text, cache: KVCache, came: Came, *, exclude_self: bool) -> None:
    found = cache.attend(
        0,
        came.query,
        came.extension,
        came.counted,
        Visibility(exclude_self),
        scale=1.0,
        key_bias=KeyBias(text.age, EXTRA),
    )
    for row, tokens in enumerate(came.tokens):
        for token, column in tokens:
            expected = text.attended(row, token, exclude_self=exclude_self)
            torch.testing.assert_close(found[row, :, column], expected, rtol=0, atol=2e-5)


calls = st.lists(
    st.lists(st.tuples(st.integers(0, 7) | st.just(1), st.integers(0, 2)), min_size=ROWS, max_size=ROWS)
    | st.just([(1, 0)] * ROWS),
    min_size=1,
    max_size=8,
)
"""Of each call and row, how many tokens come, and how much padding is in front of them."""


@given(
    age=st.integers(2, 6),
    page_size=st.sampled_from([0, 1, 3, 4]),
    exclude_self=st.booleans(),
    most_copied=st.sampled_from([0.0, 1.25]),
    calls=calls,
    seed=st.integers(0, 9),
)
@example(5, 0, False, 0.0, [[(1, 0), (1, 0)], [(1, 2), (0, 0)]], 0)  # more columns than there is room for
def test_any_pieces_are_those_of_a_list(age, page_size, exclude_self, most_copied, calls, seed):
    """`page_size` 0: the contiguous cache. Pages are read side by side, or in chunks."""
    text, used, pages, sequences = Text(age, seed), [0] * ROWS, None, []
    if page_size:
        pages = paged(age, page_size)
        pages.open()  # so that rows and sequences have other numbers
        sequences = [pages.open() for _ in range(ROWS)][::-1]
    cache = contiguous(age) if pages is None else pages.rows(sequences)
    for call in calls:
        counts, before = zip(*call, strict=True)
        came = text.after(used, counts, before)
        if pages is not None or not cache.empty:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attention_pages, "_MOST_COPIED", most_copied)
                check_attention(text, cache, came, exclude_self=exclude_self)
        cache.commit({0: came.extension}, came.counted)
        used = [start + count for start, count in zip(used, counts, strict=True)]
        if pages is None:
            check_contiguous(text, used, cache)
        else:
            check_paged(text, used, pages, sequences)


@settings(max_examples=30)
@given(
    age=st.integers(2, 6),
    page_size=st.sampled_from([1, 4]),
    calls=st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=ROWS, max_size=ROWS),
        min_size=1,
        max_size=6,
    ),
)
def test_drafts_leave_nothing_in_the_ring(age, page_size, calls):
    """`calls`: tokens that are right, and wrong ones behind them, which are computed and forgotten."""
    text, other, used = Text(age), Text(age, 1), [0] * ROWS
    pages = paged(age, page_size)
    sequences = [pages.open() for _ in range(ROWS)]
    for call in calls:
        right, wrong = zip(*call, strict=True)
        everything = [one + more for one, more in zip(right, wrong, strict=True)]
        for name in ("key", "value", "drops"):
            for row, (start, count) in enumerate(zip(used, right, strict=True)):
                getattr(other, name)[: start + count, row] = getattr(text, name)[: start + count, row]
        came = other.after(used, everything, [0] * ROWS)
        undecided = UndecidedCache(pages.rows(sequences))
        undecided.commit({0: came.extension}, came.counted)
        check_paged(text, used, pages, sequences)
        undecided.take_in(right)
        used = [start + count for start, count in zip(used, right, strict=True)]
        check_paged(text, used, pages, sequences)


@pytest.mark.parametrize("cut", [3, 5, 11])
def test_a_ring_that_a_snapshot_holds_is_copied_before_it_is_written(cut: int) -> None:
    """Before the ring is full, when it just is, and later."""
    text, pages = Text(5), paged(5, 4)
    rows = [pages.open() for _ in range(ROWS)]
    prompt = text.after([0] * ROWS, [cut] * ROWS, [0] * ROWS)
    pages.rows(rows).commit({0: prompt.extension}, None)
    snapshot = pages.keep(rows[0])
    kept = torch.from_numpy(snapshot.pages).long()
    before = pages._pool.key[kept].clone()
    foreseen = pages.pages_to_begin(1, snapshot)
    begun = pages.open(snapshot)
    free = pages.pages_free
    for tokens in range(cut, cut + 12):
        came = text.after([tokens] * ROWS, [1] * ROWS, [0] * ROWS)
        pages.rows([begun, rows[1]]).commit({0: came.extension}, None)
        check_paged(text, [tokens + 1] * ROWS, pages, [begun, rows[1]])
        if tokens == cut:
            assert 0 < free - pages.pages_free <= foreseen + HEADS  # the other row's heads, too
    assert torch.equal(pages._pool.key[kept], before)
    check_paged(text, [cut], pages, rows[:1])


@pytest.mark.parametrize("age", [61, 513])
def test_a_cache_that_is_shorter_than_the_ring(age: int) -> None:
    """Nothing is ever behind the ring; where that would be, tables have ended, or are another head's."""
    text, pages = Text(age), paged(age, 4)
    rows, used = [pages.open() for _ in range(ROWS + 1)][1:], 0
    for tokens in (9, 1, 30, 1, 1, 18):
        came = text.after([used] * ROWS, [tokens] * ROWS, [0] * ROWS)
        check_attention(text, pages.rows(rows), came, exclude_self=False)
        pages.rows(rows).commit({0: came.extension}, None)
        used += tokens
        check_paged(text, [used] * ROWS, pages, rows)
    assert used == LONGEST


@pytest.mark.parametrize("age", [2, 17, 513])
def test_one_more_token_writes_two_slots_of_a_head_at_most(age: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the window: of old tokens only the one that leaves it is written again."""
    extension = Extension(
        torch.zeros(1, ROWS, HEADS, CHANNELS + EXTRA),
        torch.zeros(1, ROWS, HEADS, CHANNELS),
        torch.zeros(age, ROWS, HEADS, dtype=torch.bool),
    )
    lengths, seen = torch.full((ROWS, HEADS), age + 3), torch.full((ROWS,), age + 9)
    edit = edit_of(extension, KeyBias(age, EXTRA), None, lengths, seen)
    assert edit.slots.shape == (2, ROWS, HEADS) and edit.moved is not None and len(edit.moved) == 1
    written: list[int] = []
    write_at = paged_writing.write_at
    monkeypatch.setattr(
        paged_writing, "write_at", lambda *args: written.append(args[1].numel()) or write_at(*args)
    )
    cache = paged(2, 4)
    sequences = [cache.open() for _ in range(ROWS)]
    for _ in range(9):
        cache.rows(sequences).commit({0: extension._replace(hides=extension.hides[:2])}, None)
    assert written == [2 * ROWS * HEADS] * 9
