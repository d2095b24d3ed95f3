"""Cancelled requests, listeners and models that fail, many threads: the others go on, and nothing is left."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lckv.generation.requests import Completion, TokenEvent
from tests.lckv.cache.models import model, text
from tests.lckv.generation.engines import GREEDY, empty, engine


def test_cancelling_at_any_moment_frees_everything() -> None:
    built = model("plain")
    steps = 12
    for moment in range(steps):
        tried = engine(built, prefill_chunk=4, max_batch_size=1)
        events: list[TokenEvent] = []
        victim = tried.submit(text(13), GREEDY, request_id="victim", on_token=events.append)
        other = tried.submit(text(3), GREEDY)
        for _ in range(moment):
            tried.step()
        assert tried.cancel("victim")
        assert not tried.cancel("victim")
        answer = victim.result(0)
        assert answer.finish_reason == "cancelled"
        assert (events[-1].token, events[-1].finish_reason) == (None, "cancelled")
        assert len(answer.token_ids) == sum(event.token is not None for event in events) == max(0, moment - 3)
        assert tried.stats().pages_in_use == 0
        tried.run_until_idle()
        assert other.result(0).finish_reason == "length"
        assert empty(tried)
        assert not tried.cancel("victim")


def test_a_waiting_request_can_be_cancelled() -> None:
    tried = engine(model("plain"), max_batch_size=1)
    first, second, third = (tried.submit([1, number], GREEDY) for number in range(3))
    tried.step()
    tried.cancel(second.request_id)
    assert second.result(0).finish_reason == "cancelled"
    tried.run_until_idle()
    assert {request.result(0).finish_reason for request in (first, third)} == {"length"}
    assert tried.stats().cancelled == 1


def test_a_listener_may_cancel_and_submit() -> None:
    tried = engine(model("plain"))
    more: list[Any] = []

    def listen(event: TokenEvent) -> None:
        if event.text_offset == 0 and event.finish_reason is None and not more:
            more.append(tried.submit([2], GREEDY))
            tried.cancel(event.request_id)

    request = tried.submit([1], GREEDY, on_token=listen)
    tried.step()
    assert request.finished
    tried.run_until_idle()
    assert (request.result(0).finish_reason, more[0].result(0).finish_reason) == ("cancelled", "length")
    assert empty(tried)


def test_a_listener_that_fails_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    tried = engine(model("plain"))

    def listen(event: TokenEvent) -> None:
        raise OSError("nobody there")

    request, other = tried.submit([1], GREEDY, on_token=listen), tried.submit([1], GREEDY)
    tried.run_until_idle()
    assert (request.result(0).finish_reason, other.result(0).finish_reason) == ("cancelled", "length")
    assert "on_token of request" in caplog.text
    assert empty(tried)


def _failing(
    built: Any, monkeypatch: pytest.MonkeyPatch, fails: Callable[[torch.Tensor], bool], error: BaseException
) -> None:
    run = built.model.run

    def broken(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if fails(hidden_states):
            raise error
        return run(hidden_states, *args, **kwargs)

    monkeypatch.setattr(built.model, "run", broken)


def test_a_failure_of_the_model_ends_those_that_it_hits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = model("plain")
    _failing(built, monkeypatch, lambda hidden: hidden.shape[1] == 9, torch.OutOfMemoryError("too much"))
    tried = engine(built)
    other = tried.submit(text(3), GREEDY)
    tried.step()
    hit = tried.submit(text(9), GREEDY)
    tried.run_until_idle()
    assert (hit.result(0).finish_reason, other.result(0).finish_reason) == ("error", "length")
    assert hit.result(0).error == "the model failed: OutOfMemoryError: too much"
    assert "the model failed on 1 requests" in caplog.text
    assert tried.stats().failed == 1
    assert empty(tried)
    with pytest.raises(RuntimeError, match="the model failed: OutOfMemoryError: too much"):
        tried.generate([text(9)], GREEDY)


def test_logits_that_are_no_numbers_end_their_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model("plain")
    head = built.lm_head.forward

    def broken(hidden_states: torch.Tensor) -> torch.Tensor:
        logits = head(hidden_states)
        logits[0, 3] = torch.nan
        return logits

    monkeypatch.setattr(built.lm_head, "forward", broken)
    tried = engine(built)
    hit, other = tried.submit([1], GREEDY), tried.submit([2], replace(GREEDY, max_new_tokens=1))
    tried.step()
    assert hit.result(0).error == "the model's logits are not finite; are its weights and dtype right?"
    assert other.result(0).finish_reason == "length"


@pytest.mark.parametrize("part", ["model", "lm_head"])
def test_an_interrupt_leaves_requests_that_can_go_on(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the cache has taken in a token, and after."""
    built = model("plain")
    expected = engine(built).generate([text(5)], GREEDY)[0].token_ids
    tried = engine(built)
    request = tried.submit(text(5), GREEDY)
    tried.step()
    tried.step()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(built.model.norm if part == "model" else built.lm_head, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tried.step()
    tried.run_until_idle()
    assert request.result(0).token_ids == expected


def test_waiting_for_an_answer_ends_in_time() -> None:
    tried = engine(model("plain"))
    request = tried.submit([1], GREEDY)
    with pytest.raises(
        TimeoutError, match=r"is not finished after 0.01 seconds; does a thread run the engine's step\?"
    ):
        request.result(0.01)
    assert tried.wait_for_work(0)
    tried.run_until_idle()
    assert not tried.wait_for_work(0.01)


def test_requests_and_cancellations_from_many_threads() -> None:
    built = model("CLA")
    params = [replace(GREEDY, temperature=1.0, seed=seed) for seed in range(6)]
    expected = [engine(built).generate([text(5, seed)], params[seed])[0].token_ids for seed in range(6)]
    tried = engine(built, pages=60, max_batch_size=3)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if tried.wait_for_work(0.05):
                tried.step()

    answers: dict[tuple[int, int], Completion] = {}

    def ask(number: int) -> None:
        for turn in range(3):
            request = tried.submit(text(5, number), params[number])
            if (number + turn) % 3 == 0:
                time.sleep(0.01)
                tried.cancel(request.request_id)
            answers[number, turn] = request.result(60)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    server = threading.Thread(target=serve)
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    server.join(60)
    assert len(answers) == 18
    for (number, _), answer in answers.items():
        if answer.finish_reason == "cancelled":
            assert answer.token_ids == expected[number][: len(answer.token_ids)]
        else:
            assert answer.token_ids == expected[number]
    assert empty(tried)
