"""Requests that come, go, make room for each other and come back in any order."""

import gc
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.generation.prefixes import Prefixes
from lckv.generation.scheduler import Scheduler
from lckv.generation.stats import Counters
from tests.lckv.cache.models import model, text
from tests.lckv.generation.engines import GREEDY, empty, engine

_ANSWERS: dict[tuple[str, int, int], tuple[int, ...]] = {}


def _alone(policy: str, length: int, new_tokens: int) -> tuple[int, ...]:
    key = policy, length, new_tokens
    if key not in _ANSWERS:
        params = replace(GREEDY, max_new_tokens=new_tokens, temperature=1.0, seed=length)
        _ANSWERS[key] = engine(model("CLA", policy)).generate([text(length, length)], params)[0].token_ids
    return _ANSWERS[key]


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from([1, 4, 11, 17]), st.sampled_from([1, 6, 14])),
    st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("score"), st.integers(2, 9), st.just(0)),
)


@settings(max_examples=12)
@given(
    actions=st.lists(ACTIONS, min_size=3, max_size=12),
    pages=st.integers(40, 90),
    chunk=st.sampled_from([3, 8, 64]),
)
@pytest.mark.parametrize("policy", ["dense", "dmc"])
def test_whatever_happens_answers_are_right_and_nothing_is_left(
    policy: str, actions: list[tuple[str, int, int]], pages: int, chunk: int
) -> None:
    tried = engine(model("CLA", policy), pages=pages, prefill_chunk=chunk, max_batch_size=3)
    requests = []
    for action, number, new_tokens in actions:
        if action == "submit":
            params = replace(GREEDY, max_new_tokens=new_tokens, temperature=1.0, seed=number)
            requests.append((tried.submit(text(number, number), params), _alone(policy, number, new_tokens)))
        elif action == "cancel" and number < len(requests):
            tried.cancel(requests[number][0].request_id)
        elif action == "score":
            tried.score([text(number)])
        elif action == "step":
            for _ in range(number):
                tried.step()
    tried.run_until_idle()
    for request, expected in requests:
        answer = request.result(0)
        if answer.finish_reason == "cancelled":
            assert answer.token_ids == expected[: len(answer.token_ids)]
        else:
            assert answer.token_ids == expected
    assert empty(tried)


def test_nothing_grows_with_the_number_of_finished_requests() -> None:
    tried = engine(model("CLA"))

    def objects_after(requests: int) -> int:
        for number in range(requests):
            tried.submit([number % 50], replace(GREEDY, max_new_tokens=1))
            tried.run_until_idle()
        gc.collect()
        return len(gc.get_objects())

    before = objects_after(20)
    assert objects_after(60) - before < 20
    assert tried.stats().finished == 80


def test_the_rate_is_that_of_the_newest_steps() -> None:
    counters, now = Counters(), time.monotonic()
    for _ in range(500):
        counters.step(now - 1000, 1)
    for _ in range(64):
        counters.step(now - 2, 1)
    tried = engine(model("CLA"))
    rate = counters.stats(
        Scheduler(
            tried.cache,
            Prefixes(tried.cache),
            max_batch_size=1,
            max_waiting=1,
            prefill_chunk=1,
            exact=False,
            iterated=False,
        ),
        tried.cache,
        1.0,
    ).tokens_per_second
    assert 20 < rate < 33


def test_answers_go_on_while_a_long_prompt_is_read() -> None:
    tried = engine(model("plain"), prefill_chunk=8)
    first = tried.submit(text(3), replace(GREEDY, max_new_tokens=30))
    tried.step()
    second = tried.submit(text(40), replace(GREEDY, max_new_tokens=2))
    tokens = []
    while not second.finished:
        tokens.append([event.request_id == first.request_id for event in tried.step()])
    assert tokens == [[True]] * 4 + [
        [True, False],
        [True, False],
    ]  # 5 chunks, the last of which gives a token


def test_prompts_are_read_together_as_far_as_a_chunk_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model("plain")
    run, shapes = built.model.run, []

    def watched(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(hidden_states.shape[:2]))
        return run(hidden_states, *args, **kwargs)

    monkeypatch.setattr(built.model, "run", watched)
    tried = engine(built, prefill_chunk=20)
    for length in (5, 6, 4, 30, 1):
        tried.submit(text(length, length), replace(GREEDY, max_new_tokens=1))
    tried.run_until_idle()
    # The prompt of one token goes with the answers, in a step; that of 30 waits for a chunk of its own.
    assert shapes == [(3, 6), (1, 20), (1, 10)]


def test_requests_wait_until_there_is_room_for_their_prompt_in_the_order_in_which_they_came() -> None:
    tried = engine(model("plain"), pages=8 * 10)  # 40 tokens
    for length in (20, 25, 2):
        tried.submit(text(length, length), replace(GREEDY, max_new_tokens=4))
    tried.step()
    assert (tried.stats().running, tried.stats().waiting) == (1, 2)
    tried.run_until_idle()
    assert tried.stats().preemptions == 0


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    built = model("plain")
    params = [replace(GREEDY, max_new_tokens=length) for length in (20, 20, 20, 1)]
    prompts = [text(length, seed) for seed, length in enumerate((8, 8, 8, 35))]
    expected = [
        engine(built).generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)
    ]
    tried = engine(
        built, pages=8 * 14, max_batch_size=3
    )  # 56 tokens, of 84 that the first three need in the end
    requests = [tried.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    steps = []
    while tried.has_work:
        steps.append({event.request_id: event.finish_reason for event in tried.step()})
    ends = [next(n for n, step in enumerate(steps) if step.get(request.request_id)) for request in requests]
    assert ends[0] == ends[1] < ends[2] < ends[3]
    answers = [request.result(0) for request in requests]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert answers[0].preemptions == 0 < answers[2].preemptions
    assert tried.stats().preemptions == sum(answer.preemptions for answer in answers)
