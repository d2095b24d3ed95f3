"""Requests that come, go, make room for each other and come back in any order."""

import gc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
@given(actions=st.lists(ACTIONS, min_size=3, max_size=12), pages=st.integers(40, 90), chunk=st.sampled_from([3, 8, 64]))
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
    tried = engine(model("CLA"), max_batch_size=4)

    def run(requests: int) -> int:
        for number in range(requests):
            tried.submit([number % 50], replace(GREEDY, max_new_tokens=1))
            if number % 4 == 3:
                tried.run_until_idle()
        gc.collect()
        return len(gc.get_objects())

    run(300)  # the window of the rate is full
    before = run(8)
    assert run(120) - before < 20
    assert tried.stats().finished == 428
