"""Log-probabilities of prompts: those of the model and of `Engine.score`, however the prompt is computed."""

from dataclasses import replace

import pytest
import torch

from lckv.generation.following import following
from lckv.generation.requests import Completion, TokenEvent
from tests.lckv.cache.models import CASES, VOCABULARY, model, parallel_logits, text
from tests.lckv.generation.engines import GREEDY, empty, engine

PROMPT = text(9, seed=2)
SCORED = replace(GREEDY, prompt_logprobs=3, logprobs=3)


def logprobs_of(completion: Completion) -> list[float]:
    assert completion.prompt_logprobs is not None
    return [choice.logprob for choice in completion.prompt_logprobs if choice.logprob is not None]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_they_are_those_of_the_model_and_of_scores(name: str, policy: str) -> None:
    built = model(name, policy)
    tried = engine(built, prefill_chunk=8)  # exact for iterated maps: fewer tokens than passes
    completion = tried.generate([PROMPT], SCORED)[0]
    choices = completion.prompt_logprobs
    assert choices is not None and [choice.token for choice in choices] == PROMPT[1:]
    logprobs = parallel_logits(built, PROMPT)[:-1].log_softmax(-1)
    wanted = logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None]).squeeze(1)
    found = torch.tensor(logprobs_of(completion))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(found, tried.score([PROMPT])[0].logprobs, rtol=0, atol=2e-5)
    best = logprobs.topk(3)
    for place, choice in enumerate(choices):
        assert [token for token, _ in choice.top_logprobs] == best.indices[place].tolist()
        values = [value for _, value in choice.top_logprobs]
        assert values == pytest.approx(best.values[place].tolist(), abs=2e-5)
    assert completion.token_ids == engine(built).generate([PROMPT], GREEDY)[0].token_ids
    assert empty(tried)


@pytest.mark.parametrize(
    ("name", "policy"), [("CLA", "dense"), ("LCKV", "dense"), ("LCKV", "dmc"), ("sliding cyclic", "dense")]
)
def test_neighbours_and_repetition_change_nothing(name: str, policy: str) -> None:
    """With a tolerance, iterated maps take as many passes as the row needs."""
    built = model(name, policy)
    settings = {"prefill_chunk": 32, "prefill_tolerance": 0.05}
    prompts = [text(length, seed=length) for length in (30, 5, 12, 30)]
    alone = [engine(built, **settings).generate([prompt], SCORED)[0] for prompt in prompts]
    tried = engine(built, **settings)
    for _ in range(2):  # what the first time has left must not be missing the second time
        for one, among in zip(alone, tried.generate(prompts, SCORED), strict=True):
            assert logprobs_of(among) == pytest.approx(logprobs_of(one), abs=2e-5)


@pytest.mark.parametrize("settings", [{"prefill": "exact"}, {"prefill_chunk": 4}, {"prefill_chunk": 1}])
def test_chunks_change_nothing(settings: dict) -> None:
    for name in ("plain", "LCKV"):
        expected = logprobs_of(engine(model(name)).generate([PROMPT], SCORED)[0])
        found = logprobs_of(engine(model(name), **settings).generate([PROMPT], SCORED)[0])
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_a_request_that_is_set_aside_has_each_once(steps: int) -> None:
    built = model("CLA")
    prompt = text(20)
    expected = engine(built).generate([prompt], SCORED)[0]
    tried = engine(built, prefill_chunk=6)
    request = tried.submit(prompt, SCORED)
    for _ in range(steps):
        tried.step()
    tried.score([text(5)])
    tried.run_until_idle()
    assert request.result(0).preemptions == 1
    assert logprobs_of(request.result(0)) == pytest.approx(logprobs_of(expected), abs=2e-5)
    assert request.result(0).token_ids == expected.token_ids


def test_no_token_need_be_generated() -> None:
    tried = engine(model("plain"))
    completion = tried.generate([PROMPT], replace(SCORED, max_new_tokens=0))[0]
    assert (completion.token_ids, completion.finish_reason) == ((), "length")
    assert logprobs_of(completion) == logprobs_of(tried.generate([PROMPT], SCORED)[0])
    assert tried.stats().prompt_tokens == 18
    assert tried.generate([[5]], replace(SCORED, max_new_tokens=0))[0].prompt_logprobs == ()
    assert empty(tried)


def test_the_first_event_has_them() -> None:
    events: list[TokenEvent] = []
    tried = engine(model("plain"), prefill_chunk=4)
    request = tried.submit(PROMPT, SCORED, on_token=events.append)
    other = tried.submit(PROMPT, GREEDY)
    tried.run_until_idle()
    assert events[0].prompt_logprobs == request.result(0).prompt_logprobs is not None
    assert all(event.prompt_logprobs is None for event in events[1:])
    assert other.result(0).prompt_logprobs is None


def test_a_request_that_ends_before_has_none() -> None:
    tried = engine(model("plain"), prefill_chunk=4)
    request = tried.submit(PROMPT, SCORED)
    tried.step()
    tried.cancel(request.request_id)
    assert request.result(0).prompt_logprobs is None


def test_logits_that_are_not_finite_end_the_request() -> None:
    built = model("plain")
    tried = engine(built)
    head = built.lm_head

    class Broken(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            logits = head(hidden_states)
            return logits if len(logits) == 1 else logits.index_fill(0, torch.tensor([3]), torch.nan)

    try:
        built.lm_head = Broken()
        with pytest.raises(RuntimeError, match="the model's logits are not finite"):
            tried.generate([PROMPT], SCORED)
    finally:
        built.lm_head = head
    assert empty(tried)


def test_as_many_as_the_vocabulary_has() -> None:
    scored = following(torch.nn.Identity(), torch.randn(3, VOCABULARY), [1, 2, 3], best=VOCABULARY + 5)
    assert scored.best.shape == (3, VOCABULARY)
    torch.testing.assert_close(scored.best_logprobs.exp().sum(-1), torch.ones(3))
