"""Sequences that begin from snapshots say what they would say alone, and pages are held by whom they belong
to."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from torch import Tensor

from lckv.cache.paged import PagedCache, Snapshot
from lckv.cache.pool import OutOfPagesError
from tests.lckv.cache.models import CASES, logits, model, paged_cache, parallel_logits, text
from tests.lckv.cache.test_paged import Requests, close, decode, everything, owned_pages


def check_holders(cache: PagedCache, snapshots: list[Snapshot]) -> None:
    """Every page is free, or held as often as tables and snapshots say;
    those that may be written are held once."""
    pool, owned = cache._pool, Counter(owned_pages(cache).tolist())
    kept = Counter(page for snapshot in snapshots for page in snapshot.pages.tolist())
    numbers = range(1, cache.pages + 1)
    assert pool._holders[0, 1:].tolist() == [owned[page] for page in numbers]
    assert pool._holders[1, 1:].tolist() == [kept[page] for page in numbers]
    free = pool._free_list[: cache.pages_free].tolist()
    assert sorted([*free, *(owned | kept)]) == list(numbers)
    assert (cache.pages_in_use, cache.pages_kept) == (len(owned), len(set(kept) - set(owned)))
    assert cache.pages_free + cache.pages_in_use + cache.pages_kept == cache.pages


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_a_sequence_and_others_from_its_snapshot_go_on_apart(name: str, policy: str) -> None:
    """Cuts at the border of a page, behind it and within it. The sequence goes on first, then a copy with the
    same tokens, one with others, one token by token."""
    built = model(name, policy)
    for cut in (8, 9, 15):
        tokens, other = text(26, 1), [*text(26, 1)[:cut], *text(26 - cut, 2)]
        expected, different = parallel_logits(built, tokens), parallel_logits(built, other)
        cache = paged_cache(built, max_sequences=4)
        first = cache.open()
        said = logits(built, [tokens[:cut]], cache.rows([first]))
        snapshot = cache.keep(first)
        before = everything(cache)[:2]
        said += logits(built, [tokens[cut:]], cache.rows([first]))
        close(said, expected)
        index = torch.from_numpy(snapshot.pages).long()
        for memory, old in zip((cache._pool.key, cache._pool.value), before, strict=True):
            assert torch.equal(memory[index], old[index])
        rows = [cache.open(snapshot), cache.open(snapshot), cache.open(snapshot)]
        assert cache.rows(rows).seen.tolist() == [cut] * 3
        found = logits(built, [tokens[cut:], other[cut:]], cache.rows(rows[:2]))
        close([found[0]], expected[cut:])
        close([found[1]], different[cut:])
        close(decode(built, cache.rows(rows[2:]), other[cut:], [1] * (26 - cut)), different[cut:])
        check_holders(cache, [snapshot])
        for sequence in (first, *rows):
            cache.close(sequence)
        assert cache.pages_in_use == 0 < cache.pages_kept
        cache.drop(snapshot)
        assert cache.pages_free == cache.pages


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_a_snapshot_serves_for_as_many_tokens_as_it_says(name: str, policy: str) -> None:
    built, tokens = model(name, policy), text(30, 3)
    expected = parallel_logits(built, tokens)
    cache = paged_cache(built)
    whole = cache.open()
    logits(built, [tokens[:23]], cache.rows([whole]))
    snapshot = cache.keep(whole)
    cache.close(whole)
    # A window of 5: the 4 newest of 23 tokens lie in slots 19 to 22, the pages of which begin at 16.
    fewest = 23 if policy == "dmc" else 20 if "s" in built.config.compression["layer_types"] else 0
    assert snapshot.fewest_tokens == fewest
    for cut in {23, 22, 20, 13, 8, 1} & set(range(fewest, 24)):
        sequence = cache.open(snapshot, cut)
        assert cache.pages_in_use == len(set(owned_pages(cache).tolist()))
        close(logits(built, [tokens[cut:]], cache.rows([sequence])), expected[cut:])
        check_holders(cache, [snapshot])
        cache.close(sequence)
    for wrong in {fewest - 1, 24} - {-1}:
        message = f"a snapshot of 23 tokens does not serve for {wrong}; it serves for {fewest} to 23"
        with pytest.raises(ValueError, match=message):
            cache.open(snapshot, wrong)
    assert cache.pages_in_use == 0


@pytest.mark.parametrize(("name", "policy"), CASES)
@pytest.mark.parametrize("new_tokens", [1, 12])
def test_pages_are_foreseen(name: str, policy: str, new_tokens: int) -> None:
    """Before a sequence begins, and when it has begun; exactly where nothing is merged or outrun."""
    built, cache = model(name, policy), paged_cache(model(name, policy))
    whole = cache.open()
    logits(built, [text(22)], cache.rows([whole]))
    snapshot = cache.keep(whole)
    for tokens in {snapshot.tokens, snapshot.fewest_tokens} - {0}:
        foreseen = cache.pages_to_begin(new_tokens, snapshot, tokens)
        sequence, free = cache.open(snapshot, tokens), cache.pages_free
        needed = cache.pages_needed([sequence], new_tokens)
        assert free == cache.pages_free and needed <= foreseen
        logits(built, [text(new_tokens, 1)], cache.rows([sequence]))
        taken = free - cache.pages_free
        assert taken <= needed
        assert (
            policy == "dmc" or "s" in built.config.compression["layer_types"] or taken == needed == foreseen
        )
        cache.close(sequence)
    assert cache.pages_to_begin(new_tokens) == cache.pages_needed([cache.open()], new_tokens)


def test_copies_that_find_no_room_change_nothing_and_a_dropped_snapshot_needs_none() -> None:
    built, tokens = model("plain"), text(11)
    cache = paged_cache(built, pages=8 * 2)  # 8 tokens of 4 layers and 2 heads
    sequence = cache.open()
    logits(built, [tokens[:7]], cache.rows([sequence]))
    snapshot = cache.keep(sequence)
    assert cache.pages_free == 0 and cache.pages_needed([sequence], 1) == 8
    before = everything(cache)
    with pytest.raises(OutOfPagesError, match="1 more tokens in 1 sequences need 8 pages, but 0 of 16"):
        logits(built, [tokens[7:8]], cache.rows([sequence]))
    assert all(torch.equal(one, two) for one, two in zip(before, everything(cache), strict=True))
    cache.drop(snapshot)
    assert cache.pages_needed([sequence], 1) == 0
    close(logits(built, [tokens[7:8]], cache.rows([sequence])), parallel_logits(built, tokens)[7:8])


def test_forgetting_tokens_of_a_shared_page_leaves_the_snapshot_alone() -> None:
    built, tokens, other = model("CLA"), text(20), text(20, 1)
    cache = paged_cache(built)
    sequence = cache.open()
    logits(built, [tokens[:12]], cache.rows([sequence]))
    snapshot = cache.keep(sequence)
    logits(built, [tokens[12:13]], cache.rows([sequence]))  # from here on it writes to pages of its own
    cache.rows([sequence]).drop_newest(3)  # and now to one that the snapshot holds
    close(
        logits(built, [other[10:]], cache.rows([sequence])),
        parallel_logits(built, [*tokens[:10], *other[10:]])[10:],
    )
    check_holders(cache, [snapshot])
    again = cache.open(snapshot)
    close(logits(built, [tokens[12:]], cache.rows([again])), parallel_logits(built, tokens)[12:])


class SharedRequests(Requests):
    """Sequences also begin from snapshots of others, which come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Snapshot, list[int], Tensor]] = []

    @precondition(lambda self: any(self.texts.values()))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(row for row, tokens in self.texts.items() if tokens)))
        said = torch.cat(self.said[sequence])
        self.kept.append((self.cache.keep(sequence), list(self.texts[sequence]), said))

    @precondition(lambda self: self.kept and len(self.texts) < 3)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        snapshot, tokens, said = data.draw(st.sampled_from(self.kept))
        count = data.draw(st.integers(max(1, snapshot.fewest_tokens), snapshot.tokens))
        sequence = self.cache.open(snapshot, count)
        self.texts[sequence], self.said[sequence] = tokens[:count], [said[:count]]

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.kept) - 1))
        self.cache.drop(self.kept.pop(place)[0])

    @invariant()
    def every_page_has_one_owner(self) -> None:
        check_holders(self.cache, [snapshot for snapshot, _, _ in self.kept])

    @invariant()
    def heads_own_as_many_pages_as_they_need(self) -> None:
        lengths = self.cache._memory.tables.lengths
        assert np.array_equal(lengths, self.cache._memory.lengths.numpy())
        assert not self.cache._pool.key[0].any() and not self.cache._pool.value[0].any()

    def teardown(self) -> None:
        for snapshot, _, _ in self.kept:
            self.cache.drop(snapshot)
        super().teardown()


class SharedWindowedRequests(SharedRequests):
    built = model("sliding cyclic")


class SharedWholeRequests(SharedRequests):
    built = model("CLA")


class SharedLateRequests(SharedRequests):
    built = model("LCKV", "dms")


for _machine in (SharedRequests, SharedWindowedRequests, SharedWholeRequests, SharedLateRequests):
    _machine.TestCase.settings = settings(max_examples=8, stateful_step_count=20)
TestSharedRequests = SharedRequests.TestCase
TestSharedWindowedRequests = SharedWindowedRequests.TestCase
TestSharedWholeRequests = SharedWholeRequests.TestCase
TestSharedLateRequests = SharedLateRequests.TestCase
