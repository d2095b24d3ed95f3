"""Speculative decoding: the same answers as without it, whatever is drafted; and what is drafted."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.generation.config import EngineConfig
from lckv.generation.drafting import PromptLookup
from lckv.generation.draws import Draws
from lckv.generation.engine import Engine
from lckv.generation.requests import Completion
from lckv.models.configuration_lckv_llama import LCKVLlamaConfig
from lckv.models.modeling_lckv_llama import LCKVLlamaForCausalLM
from tests.lckv.cache.models import CASES, MAPS, MIXED_CASES, model, text
from tests.lckv.generation import test_constraints as constrained
from tests.lckv.generation.engines import GREEDY, empty, engine

PROMPTS = [[*text(6, 1)] * 2, text(7, 2), [3, 3, 3], text(1, 4)]
PARAMS = [
    replace(GREEDY, logprobs=2),
    replace(GREEDY, temperature=1.2, seed=1, logprobs=0),
    replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.4),
    replace(GREEDY, temperature=0.8, seed=2, top_p=0.9, presence_penalty=0.5),
]


class HalfRight:
    """Drafts what comes, with a wrong token in most drafts, and now and then nothing."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self._answers = answers

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        fitting = (answer for answer in self._answers if list(answer[: len(tokens)]) == list(tokens))
        whole = next(fitting, [])
        drafted = list(whole[len(tokens) : len(tokens) + most])
        wrong = len(tokens) * 7 % (most + 2)
        if wrong < len(drafted):
            drafted[wrong] = (drafted[wrong] + 1) % 50
        return [] if len(tokens) % 5 == 0 else drafted


def speculating(
    monkeypatch: pytest.MonkeyPatch, prompts: Sequence[Sequence[int]], answers: Sequence[Completion]
) -> None:
    """Let drafts be those of `HalfRight`."""
    known = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    monkeypatch.setattr("lckv.generation.engine.PromptLookup", lambda least: HalfRight(known))


def same(answers: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for answer, right in zip(answers, expected, strict=True):
        assert (answer.token_ids, answer.text) == (right.token_ids, right.text)
        assert (answer.finish_reason, answer.stopped_by) == (right.finish_reason, right.stopped_by)
        if right.logprobs is None:
            assert answer.logprobs is None
            continue
        assert answer.logprobs == pytest.approx(right.logprobs, abs=1e-5)
        for tokens, others in zip(answer.top_logprobs, right.top_logprobs, strict=True):
            assert [token for token, _ in tokens] == [token for token, _ in others]


@pytest.mark.parametrize(("name", "policy"), [*CASES, *MIXED_CASES[1:]])
def test_answers_are_those_without_speculation(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled ones together, with penalties and log-probabilities; also in so few pages that
    requests give theirs to one another."""
    built = model(name, policy)
    plain = engine(built)
    expected = plain.generate(PROMPTS, PARAMS)
    speculating(monkeypatch, PROMPTS, expected)
    pages = plain.cache.pages_needed([plain.cache.open()], len(PROMPTS[0]) + GREEDY.max_new_tokens)
    for tried in (
        engine(built, speculation="prompt_lookup", speculation_tokens=4),
        engine(built, speculation="prompt_lookup", speculation_tokens=4, pages=int(1.6 * pages)),
    ):
        same(tried.generate(PROMPTS, PARAMS), expected)
        stats = tried.stats()
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        assert stats.draft_acceptance == stats.accepted_tokens / stats.drafted_tokens
        assert empty(tried)
    if policy == "dense" and "YOCO" not in name:
        assert stats.preemptions > 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_fewer_steps_and_the_same_text_as_transformers_prompt_lookup(prefix_cache: bool) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    built = LCKVLlamaForCausalLM(LCKVLlamaConfig(**sizes)).eval()
    built.load_state_dict(llama.state_dict())
    prompt = text(12, 3)[:12]
    prompt = [token % 30 for token in prompt] * 2
    settings = {"do_sample": False, "max_new_tokens": 60}
    theirs = llama.generate(torch.tensor([prompt]), prompt_lookup_num_tokens=4, **settings)[0].tolist()
    tried = engine(built, speculation="prompt_lookup", speculation_match=1, prefix_cache=prefix_cache)
    request, steps = tried.submit(prompt, replace(GREEDY, max_new_tokens=60)), 0
    while tried.has_work:
        tried.step()
        steps += 1
    assert [*prompt, *request.result(0).token_ids] == theirs
    stats = tried.stats()
    assert stats.accepted_tokens > 20  # the text of such a model soon goes round in circles
    assert steps == 60 - stats.accepted_tokens
    follow = tried.submit([*theirs, 5], GREEDY)
    tried.run_until_idle()
    known = len(theirs) - 1 if prefix_cache else 0
    assert follow.result(0).cached_tokens == known
    assert follow.result(0).token_ids == engine(built).generate([[*theirs, 5]], GREEDY)[0].token_ids


def test_answers_end_where_they_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a token, a text, a grammar, the number of tokens and the context, inside of drafts; what was
    computed serves the next request."""
    prompts = [*constrained.PROMPTS[:5], [77] * 6, [40] * 250]
    params = [*constrained.all_params(), replace(constrained.RANDOM, seed=9)]
    free = constrained.engine().generate(prompts, params)
    middle, said = free[1].token_ids[5], free[5].text
    stop = next(
        said[start : start + 2] for start in range(4, 20) if said.find(said[start : start + 2]) == start
    )
    params[1] = replace(params[1], stop_token_ids=(middle,))
    params[5] = replace(params[5], stop=(stop,))
    expected = constrained.engine().generate(prompts, params)
    speculating(monkeypatch, prompts, free)
    tried = constrained.engine(speculation="prompt_lookup", speculation_tokens=6)
    events: dict[int, list[Any]] = {}
    requests = [
        tried.submit(prompt, each, on_token=events.setdefault(number, []).append)
        for number, (prompt, each) in enumerate(zip(prompts, params, strict=True))
    ]
    tried.run_until_idle()
    answers = [request.result(0) for request in requests]
    same(answers, expected)
    assert [answer.stopped_by for answer in (answers[1], answers[5])] == [middle, stop]
    assert tried.stats().accepted_tokens > 40
    for number, answer in enumerate(answers):
        assert tuple(event.token for event in events[number]) == answer.token_ids
        assert "".join(event.text for event in events[number]) == answer.text
        assert [event.finish_reason for event in events[number]] == [
            *[None] * (len(answer.token_ids) - 1),
            answer.finish_reason,
        ]
    whole = [*prompts[5], *answers[5].token_ids]
    (again,) = tried.generate([[*whole, 8, 9]], constrained.RANDOM)
    assert again.cached_tokens == len(whole) - 1
    assert empty(tried)


def test_drafts_take_pages_from_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for just what two requests need, their drafts wait."""
    built, prompts = model("plain"), [text(8, 1), text(8, 2)]
    params = replace(GREEDY, max_new_tokens=9)  # 16 tokens are computed, four pages of each head
    expected = engine(built).generate(prompts, params)
    pages = 2 * 4 * 2 * 4
    without = engine(built, pages=pages)
    without.generate(prompts, params)
    speculating(monkeypatch, prompts, expected)
    tried = engine(built, pages=pages, speculation="prompt_lookup", speculation_tokens=7)
    same(tried.generate(prompts, params), expected)
    assert tried.stats().preemptions == without.stats().preemptions == 0
    assert tried.stats().accepted_tokens > 0


def test_a_step_that_is_interrupted_or_fails_leaves_nothing_half_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, prompts = model("CLA", "dmc"), [text(5, 1), text(5, 2)]
    expected = engine(built).generate(prompts, GREEDY)
    speculating(monkeypatch, prompts, expected)
    tried = engine(built, speculation="prompt_lookup", speculation_tokens=3)
    requests = [tried.submit(prompt, GREEDY) for prompt in prompts]
    for _ in range(2):
        tried.step()
        assert tried.stats().compression_ratio == tried.cache.compression_ratio
    with monkeypatch.context() as broken:
        broken.setattr("lckv.cache.paged_rows.PagedRows.commit", _raise(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            tried.step()
    tried.run_until_idle()
    same([request.result(0) for request in requests], expected)
    requests = [tried.submit(prompt, GREEDY) for prompt in prompts]
    for _ in range(2):
        tried.step()
    with monkeypatch.context() as broken:
        broken.setattr("lckv.cache.paged_rows.PagedRows.commit", _raise(RuntimeError("no")))
        tried.step()
    assert [request.result(0).error for request in requests] == ["the model failed: RuntimeError: no"] * 2
    assert empty(tried)


def _raise(error: BaseException) -> Any:
    def raising(*_arguments: Any) -> None:
        raise error

    return raising


def test_logits_that_are_no_numbers_end_their_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a drafted token that are none reach the tokens before it in its draft."""
    built, prompts = model("plain"), [text(5, 1), text(5, 2)]
    expected = engine(built).generate(prompts, GREEDY)
    speculating(monkeypatch, prompts, expected)
    wrong = next(token for token in expected[0].token_ids[3:] if token not in expected[1].token_ids)
    embed = built.model.embed_tokens.forward

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        states = embed(tokens)
        if tokens.shape[1] == 5:  # of a prompt
            return states
        return states.masked_fill((tokens == wrong)[..., None], torch.nan)

    monkeypatch.setattr(built.model.embed_tokens, "forward", broken)
    tried = engine(built, speculation="prompt_lookup", speculation_tokens=3)
    requests = [tried.submit(prompt, GREEDY) for prompt in prompts]
    tried.run_until_idle()
    hit, other = (request.result(0) for request in requests)
    assert "the model's logits are not finite" in str(hit.error)
    assert hit.token_ids == expected[0].token_ids[: len(hit.token_ids)] and len(hit.token_ids) < 10
    same([other], expected[1:])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=14), st.integers(1, 3), st.integers(1, 5))
def test_prompt_lookup_copies_from_the_newest_longest_match(tokens: list[int], least: int, most: int) -> None:
    grown, lookup = tokens[: len(tokens) // 2 + 1], PromptLookup(least)
    assert lookup.draft(grown, most) == _by_comparison(grown, least, most)
    assert lookup.draft(tokens, most) == _by_comparison(tokens, least, most)


def _by_comparison(tokens: list[int], least: int, most: int) -> list[int]:
    """Every place against the end, token by token."""

    def common(place: int) -> int:
        pairs = zip(reversed(tokens[:place]), reversed(tokens), strict=False)
        return next((number for number, (one, other) in enumerate(pairs) if one != other), place)

    places = [place for place in range(1, len(tokens)) if common(place) >= least]
    if not places:
        return []
    best = max(places, key=lambda place: (common(place), place))
    whole = list(tokens)
    for number in range(most):
        whole.append(whole[best + number])
    return whole[len(tokens) :]


def test_work_of_prompt_lookup_does_not_grow_with_the_text() -> None:
    """Of a text of one token, where every place is a match, few are looked at."""
    tokens = _Counting([5] * 4000)
    lookup = PromptLookup(2)
    lookup.draft(tokens, 4)
    tokens.append(5)
    tokens.reads = 0
    assert lookup.draft(tokens, 4) == [5] * 4
    assert tokens.reads < 2000


class _Counting(list[int]):
    reads = 0

    def __getitem__(self, index: Any) -> Any:
        got = super().__getitem__(index)
        self.reads += len(got) if isinstance(index, slice) else 1
        return got


def test_numbers_that_were_seen_ahead_are_still_drawn() -> None:
    one, other = Draws(3), Draws(3)
    ahead = [drawn.random() for drawn in one.ahead(4)]
    assert [one.random(), one.random()] == ahead[:2]
    assert [drawn.random() for drawn in one.ahead(3)][:2] == ahead[2:]
    assert [other.random() for _ in range(4)] == ahead
    assert [one.random() for _ in range(6)][2:] == [other.random() for _ in range(4)]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"speculation": "magic"}, "speculation is 'magic'; it must be 'none' or 'prompt_lookup'."),
        ({"speculation_tokens": 0}, "speculation_tokens is 0; it must be at least 1."),
        ({"speculation_match": 0}, "speculation_match is 0; it must be at least 1."),
    ],
)
def test_wrong_settings(settings: dict[str, Any], problem: str) -> None:
    assert EngineConfig(**settings).problems() == [problem]
    with pytest.raises(ValueError, match=problem):
        Engine(model(next(iter(MAPS))), EngineConfig(**settings))
