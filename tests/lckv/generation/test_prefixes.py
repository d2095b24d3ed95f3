"""Beginnings are found by their tokens, the longest one, and the least recently used ones are forgotten
first."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.cache.paged import PagedCache
from lckv.generation import prefixes as prefixes_module
from lckv.generation.prefixes import Beginning, Prefixes, common_tokens
from tests.lckv.cache.models import logits, model, paged_cache


def _filled(cache: PagedCache, tokens: Sequence[int], name: str, policy: str) -> int:
    sequence = cache.open()
    logits(model(name, policy), [tokens], cache.rows([sequence]))
    return sequence


def _keep(kept: Prefixes, cache: PagedCache, tokens: Sequence[int], name: str, policy: str = "dense") -> None:
    sequence = _filled(cache, tokens, name, policy)
    kept.keep(tokens, sequence)
    cache.close(sequence)


texts = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@settings(max_examples=25)
@given(kept=st.lists(texts, max_size=8), asked=texts, most=st.integers(0, 9))
@pytest.mark.parametrize(("name", "policy"), [("CLA", "dense"), ("YOCO", "dense"), ("CLA", "dmc")])
def test_the_longest_beginning_is_found(
    name: str, policy: str, kept: list[list[int]], asked: list[int], most: int
) -> None:
    """The longest that any snapshot which was ever kept serves for; pages of 2 tokens, windows of 5."""
    cache = paged_cache(model(name, policy), page_size=2)
    tried, snapshots = Prefixes(cache), []
    for tokens in kept:
        sequence = _filled(cache, tokens, name, policy)
        tried.keep(tokens, sequence)
        snapshots.append((tokens, cache.keep(sequence).fewest_tokens))
        cache.close(sequence)
    best = 0
    for tokens, fewest in snapshots:
        longest = min(common_tokens(tokens, asked), most)
        if longest >= max(2, fewest):
            best = max(best, longest)
    snapshot, tokens = tried.find(asked, most)
    assert tokens == best and (snapshot is None) == (best == 0)
    if snapshot is not None:
        assert snapshot.fewest_tokens <= tokens <= snapshot.tokens
    assert len(tried) <= len({tuple(tokens) for tokens in kept if len(tokens) >= 2})


def test_what_a_longer_beginning_serves_for_is_not_kept_twice() -> None:
    cache = paged_cache(model("CLA"))
    tried = Prefixes(cache)
    _keep(tried, cache, range(9), "CLA")
    _keep(tried, cache, range(20), "CLA")
    _keep(tried, cache, range(12), "CLA")
    assert len(tried) == 1 and tried.find(range(30), 99).tokens == 20
    merging = paged_cache(model("CLA", "dmc"))
    tried = Prefixes(merging)
    for length in (9, 20, 12, 12):
        _keep(tried, merging, range(length), "CLA", "dmc")
    assert len(tried) == 3
    assert [tried.find(range(30), most).tokens for most in (99, 19, 11, 8)] == [20, 12, 9, 0]


def test_the_least_recently_used_goes_first_and_only_if_that_helps() -> None:
    cache = paged_cache(model("plain"), pages=8 * 12)  # 48 tokens in 4 layers and 2 heads
    tried = Prefixes(cache)
    for first in (0, 10, 20):
        _keep(tried, cache, range(first, first + 12), "plain")
    assert (cache.pages_free, cache.pages_kept, cache.pages_in_use) == (24, 72, 0)
    assert tried.find(range(99), 99).tokens == 12  # used
    tried.keep(range(10, 22), -1)  # known: used too, and no sequence is looked at
    assert not tried.make_room(97) and len(tried) == 3
    assert tried.make_room(24) and len(tried) == 3
    assert tried.make_room(25) and len(tried) == 2
    assert not tried.find(range(20, 99), 99).tokens
    tried.clear()
    assert len(tried) == 0 and cache.pages_free == cache.pages and tried.find(range(99), 99) == Beginning()


def test_number_and_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = paged_cache(model("CLA", "dmc"), pages=4000)
    tried = Prefixes(cache)
    monkeypatch.setattr(prefixes_module, "_MOST_SNAPSHOTS", 3)
    for first in range(5):
        _keep(tried, cache, range(first, first + 6), "CLA", "dmc")
    assert len(tried) == 3 and not tried.find(range(1, 9), 9).tokens and tried.find(range(2, 9), 9).tokens
    snapshot = tried.find(range(2, 9), 9).snapshot
    assert snapshot is not None and snapshot.state is not None
    beside = snapshot.num_bytes + 6 * 4
    assert beside == snapshot.state.numel() * 4 + snapshot.lengths.nbytes + snapshot.pages.nbytes + 24
    monkeypatch.setattr(prefixes_module, "_SHARE_OF_CACHE", 2.5 * beside / cache.num_bytes)
    _keep(tried, cache, range(5, 11), "CLA", "dmc")
    assert len(tried) == 2


def test_nothing_is_kept_that_is_shorter_than_a_page_or_where_it_is_switched_off() -> None:
    cache = paged_cache(model("CLA"))
    tried, off = Prefixes(cache), Prefixes(cache, enabled=False)
    _keep(tried, cache, range(3), "CLA")
    _keep(off, cache, range(12), "CLA")
    assert len(tried) == len(off) == 0 and cache.pages_free == cache.pages


def test_a_state_that_finds_no_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = paged_cache(model("CLA", "dmc"))
    sequence = _filled(cache, range(9), "CLA", "dmc")

    def full(self: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    tried = Prefixes(cache)
    monkeypatch.setattr(torch.Tensor, "clone", full)
    tried.keep(range(9), sequence)
    monkeypatch.undo()
    cache.close(sequence)
    assert len(tried) == 0 and cache.pages_free == cache.pages


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([256, 1], [1, 1], 0), ([7], [7], 1)],
)
def test_common_tokens(one: list[int], other: list[int], common: int) -> None:
    assert common_tokens(one, other) == common
