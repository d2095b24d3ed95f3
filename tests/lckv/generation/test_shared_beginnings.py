"""Requests that begin like others: what they have in common is computed once, and their answers are those of
an engine that computes everything."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.generation.engine import Engine
from lckv.generation.forward import Forward
from lckv.generation.requests import Request
from tests.lckv.cache.models import CASES, model, text
from tests.lckv.cache.test_snapshots import check_holders
from tests.lckv.generation.engines import GREEDY, empty, engine

SAMPLED = replace(GREEDY, temperature=1.0, seed=3, max_new_tokens=6)


def _exact(name: str) -> str:
    """How to read prompts of more tokens than passes without an approximation."""
    return "exact" if model(name).model.layer_types.any_cyclic else "parallel"


def _check(tried: Engine) -> None:
    """Every page belongs to whom the tables and the snapshots say."""
    check_holders(tried.cache, list(tried._prefixes._snapshots.values()))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each row of each step of any engine computes."""
    counts: list[int] = []
    call = Forward.__call__

    def watched(self: Forward, sequences: Sequence[int], tokens: Sequence[Sequence[int]], *more: Any) -> Any:
        counts.extend(map(len, tokens))
        return call(self, sequences, tokens, *more)

    monkeypatch.setattr(Forward, "__call__", watched)
    return counts


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_the_next_turn_of_a_chat_computes_only_its_new_tokens(
    name: str, policy: str, computed: list[int]
) -> None:
    """Exactly what is new, with every map and policy: a snapshot is taken where an answer ends."""
    built = model(name, policy)
    tried, prompt = engine(built), text(9, 1)
    for turn in range(4):
        expected = engine(built, prefix_cache=False, prefill="exact").generate([prompt], GREEDY)[0]
        computed.clear()
        answer = tried.generate([prompt], GREEDY)[0]
        assert answer.token_ids == expected.token_ids
        # The newest token of an answer is not computed before the next turn.
        assert sum(computed) == (9 if turn == 0 else 6) + 9
        assert answer.cached_tokens == (len(prompt) - 6 if turn else 0)
        prompt = [*prompt, *answer.token_ids, *text(5, turn)]
        _check(tried)
    stats = tried.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (9 + 24 + 39 + 54, 18 + 33 + 48)
    assert stats.prefixes > 0 < stats.pages_kept and stats.pages_in_use == 0
    assert stats.pages_free + stats.pages_kept == tried.cache.pages
    assert empty(tried)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_choices_of_one_prompt_compute_it_once(name: str, policy: str, computed: list[int]) -> None:
    """They come together; each computes the prompt's last token, whose logits it needs."""
    built, prompt = model(name, policy), text(23, 1)
    params = [replace(SAMPLED, seed=seed) for seed in range(4)]
    plain = engine(built, prefix_cache=False, prefill="exact")
    expected = [answer.token_ids for answer in plain.generate([prompt] * 4, params)]
    computed.clear()
    tried = engine(built, prefill=_exact(name))
    answers = tried.generate([prompt] * 4, params)
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.cached_tokens for answer in answers] == [0, 22, 22, 22]
    assert sum(computed) == 23 + 3 + 4 * 5
    assert empty(tried)


@pytest.mark.parametrize("policy", ["dense", "dmc"])
def test_requests_wait_only_while_another_computes_what_they_begin_with(policy: str) -> None:
    tried = engine(model("plain", policy), prefill_chunk=8)
    system, params = text(16, 1), replace(GREEDY, max_new_tokens=8)
    first = tried.submit([*system, *text(24, 2)], params)
    second = tried.submit([*system, *text(3, 3)], params)
    other = tried.submit(text(7, 4), params)
    tried.step()  # 8 of the 16 tokens that the first two share; the third one lets nobody wait
    assert (tried.stats().running, tried.stats().waiting) == (2, 1)
    tried.step()
    assert tried.stats().waiting == 1
    tried.step()  # the beginning is there, the first prompt is not
    assert (tried.stats().running, tried.stats().waiting) == (3, 0)
    tried.run_until_idle()
    assert [request.result(0).cached_tokens for request in (first, second, other)] == [0, 16, 0]
    for request in (first, second, other):
        alone = engine(model("plain", policy)).generate([request.prompt_ids], params)[0]
        assert request.result(0).token_ids == alone.token_ids
    assert empty(tried)


@pytest.mark.parametrize("how", ["cancel", "preempt"])
def test_who_waits_for_a_request_that_goes_away_goes_on(how: str) -> None:
    tried = engine(model("plain"), prefill_chunk=8)
    first, second = (tried.submit([*text(40, 1), token], GREEDY) for token in (1, 2))
    tried.step()
    assert tried.stats().waiting == 1
    if how == "cancel":
        tried.cancel(first.request_id)
    else:
        tried.score([[1, 2]])
    tried.run_until_idle()
    expected = engine(model("plain")).generate([second.prompt_ids], GREEDY)[0].token_ids
    assert second.result(0).token_ids == expected
    assert empty(tried)


def test_a_request_that_comes_while_a_long_prompt_is_computed_gets_what_is_there() -> None:
    tried = engine(model("plain"), prefill_chunk=8)
    tried.submit(text(60, 1), GREEDY)
    for _ in range(3):
        tried.step()
    late = tried.submit([*text(60, 1)[:21], 3], GREEDY)
    tried.step()
    assert tried.stats().waiting == 0
    tried.run_until_idle()
    assert late.result(0).cached_tokens == 21


@pytest.mark.parametrize(("policy", "found"), [("dense", 37), ("dmc", 32)])
def test_of_a_long_prompt_at_least_half_of_what_is_common_is_found_later(policy: str, found: int) -> None:
    """Where a snapshot serves for its own tokens only, those of 8, 16 and 32 tokens are kept."""
    tried = engine(model("plain", policy), prefill_chunk=8)
    tried.generate([text(60, 1)], GREEDY)
    answer = tried.generate([[*text(60, 1)[:37], *text(9, 2)]], GREEDY)[0]
    assert answer.cached_tokens == found
    expected = engine(model("plain", policy)).generate([[*text(60, 1)[:37], *text(9, 2)]], GREEDY)[0]
    assert answer.token_ids == expected.token_ids


def test_beginnings_give_way_before_a_request_does() -> None:
    built = model("plain")
    tried = engine(built, pages=8 * 10)  # 40 tokens
    tried.generate([text(15, 1)], GREEDY)
    assert tried.stats().pages_kept == 8 * 6
    params = replace(GREEDY, max_new_tokens=20)
    answer = tried.generate([text(18, 2)], params)[0]
    assert answer.token_ids == engine(built).generate([text(18, 2)], params)[0].token_ids
    assert tried.stats().preemptions == 0 and answer.finish_reason == "length"
    assert tried.generate([[*text(15, 1), 4]], GREEDY)[0].cached_tokens == 0  # it is gone
    assert empty(tried)


def test_a_request_that_cannot_run_yet_does_not_cost_beginnings() -> None:
    tried = engine(model("plain"), pages=8 * 16)  # 64 tokens
    tried.generate([text(8, 1)], replace(GREEDY, max_new_tokens=1))
    tried.submit(text(20, 2), GREEDY)
    tried.step()
    tried.submit(text(45, 3), GREEDY)
    tried.step()
    assert (tried.stats().waiting, tried._prefixes.find([*text(8, 1), 1], 8).tokens) == (1, 8)


def test_a_request_that_fills_the_cache_gets_the_pages_of_all_beginnings() -> None:
    built = model("YOCO")
    tried = engine(built, pages=80)
    for seed in range(6):
        tried.generate([text(20, seed)], GREEDY)
    whole = tried.generate([text(60, 1)], replace(GREEDY, max_new_tokens=60))[0]
    right = engine(built, pages=80, prefix_cache=False).generate(
        [text(60, 1)], replace(GREEDY, max_new_tokens=60)
    )[0]
    assert (whole.token_ids, whole.finish_reason) == (right.token_ids, right.finish_reason)
    assert empty(tried)


def test_without_a_prefix_cache_everything_is_computed() -> None:
    tried = engine(model("plain"), prefix_cache=False)
    answers = [tried.generate([text(30, 1)], GREEDY)[0] for _ in range(2)]
    assert answers[0] == replace(answers[1], request_id=answers[0].request_id)
    assert tried.stats().cached_prompt_tokens == tried.stats().prefixes == tried.stats().pages_kept == 0


def test_a_fault_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = engine(model("plain"))
    monkeypatch.setattr(
        tried._forward, "newest_logits", lambda *_: tried.model.lm_head.weight.new_full((1, 50), float("nan"))
    )
    request = tried.submit(text(9), GREEDY)
    tried.run_until_idle()
    assert request.result(0).finish_reason == "error"
    assert tried.stats().prefixes == 0 and tried.cache.pages_free == tried.cache.pages


def test_prompts_of_maps_that_iterate_are_found_within_the_tolerance() -> None:
    """The beginning was computed in other chunks; decoded tokens are exact."""
    built = model("LCKV")
    settings = {"prefill_tolerance": 0.05, "prefill_chunk": 32}
    prompt, params = text(40, 1), replace(GREEDY, max_new_tokens=1, logprobs=5)
    tried = engine(built, **settings)
    tried.generate([prompt[:21]], params)
    answer = tried.generate([prompt], params)[0]
    assert answer.cached_tokens == 21
    exact = engine(built, prefill="exact").generate([prompt], params)[0]
    alone = engine(built, **settings, prefix_cache=False).generate([prompt], params)[0]
    found, whole, right = (dict(each.top_logprobs[0]) for each in (answer, alone, exact))
    error = max(abs(found[token] - right[token]) for token in found.keys() & right.keys())
    error_alone = max(abs(whole[token] - right[token]) for token in whole.keys() & right.keys())
    assert error < max(0.1, 2 * error_alone)


SYSTEMS = [text(14, 100), [*text(9, 100), *text(12, 101)], text(5, 102)]
ACTIONS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.just("ask"), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.just("go on"), st.integers(0, 9), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 5), st.just(0)),
    st.tuples(st.just("score"), st.integers(2, 9), st.just(0)),
)
_EXPECTED: dict[tuple[Any, ...], tuple[int, ...]] = {}


def _alone(name: str, policy: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
    key = name, policy, prompt
    if key not in _EXPECTED:
        plain = engine(model(name, policy), prefix_cache=False, prefill="exact")
        _EXPECTED[key] = plain.generate([prompt], SAMPLED)[0].token_ids
    return _EXPECTED[key]


def _act(tried: Engine, requests: list[Request], action: str, number: int, other: int) -> None:
    if action == "ask":
        requests.append(tried.submit([*SYSTEMS[number], *text(other + 1, other)], SAMPLED))
    elif action == "go on" and number < len(requests) and requests[number].finished:
        before = requests[number]
        prompt = [*before.prompt_ids, *before.result(0).token_ids, *text(other + 1, other)]
        if len(prompt) < 40:
            requests.append(tried.submit(prompt, SAMPLED))
    elif action == "cancel" and number < len(requests):
        tried.cancel(requests[number].request_id)
    elif action == "score":
        tried.score([text(number, 7)])
    elif action == "step":
        for _ in range(number):
            tried.step()
            _check(tried)


@settings(max_examples=6)
@given(
    actions=st.lists(ACTIONS, min_size=4, max_size=14),
    pages=st.integers(60, 160),
    chunk=st.sampled_from([3, 8, 64]),
)
@pytest.mark.parametrize(
    ("name", "policy"),
    [("plain", "dense"), ("YOCO", "dense"), ("plain", "dmc"), ("LCKV", "dense"), ("sandwich", "dmc")],
)
def test_any_stream_of_requests_gets_the_answers_of_an_engine_without_a_cache(
    name: str, policy: str, actions: list[tuple[str, int, int]], pages: int, chunk: int
) -> None:
    """Shared beginnings, next turns, cancelled requests, requests that give their pages to one another. Pages
    add up after every step."""
    tried = engine(
        model(name, policy),
        pages=pages,
        prefill_chunk=chunk,
        max_batch_size=3,
        prefill=_exact(name),
    )
    requests: list[Request] = []
    for action in actions:
        _act(tried, requests, *action)
    while tried.has_work:
        tried.step()
        _check(tried)
    for request in requests:
        answer, expected = request.result(0), _alone(name, policy, request.prompt_ids)
        assert answer.token_ids == expected[: len(answer.token_ids)]
        if answer.finish_reason != "cancelled" and "do not fit" not in (answer.error or ""):
            assert answer.finish_reason == "length" and answer.token_ids
    assert empty(tried)
