"""What is refused, and how many requests at once; the sizes of caches."""

from dataclasses import replace
from typing import Any

import pytest

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.requests import QueueFullError
from lckv.generation.sampling import SamplingParams
from tests.lckv.cache.models import model, paged_cache, text
from tests.lckv.generation.engines import GREEDY, empty, engine


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "the prompt is empty; it must have at least one token."),
        ([3, 50], GREEDY, "the prompt's token 1 is 50; the model's tokens are 0 to 49."),
        ([-1], GREEDY, "the prompt's token 0 is -1; the model's tokens are 0 to 49."),
        (
            [1] * 128,
            GREEDY,
            (
                "the prompt has 128 tokens; it must have at most 127. (There is room for 128 tokens of "
                "prompt and answer together; see "
                "max_tokens and max_prompt_tokens.)"
            ),
        ),
        ([1], replace(GREEDY, top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1."),
        (
            [1],
            replace(GREEDY, stop_token_ids=(50,)),
            "stop_token_ids has 50; the model's tokens are 0 to 49.",
        ),
        (
            [1],
            replace(GREEDY, logit_bias={3: 1, -1: 1}),
            "logit_bias has -1; the model's tokens are 0 to 49.",
        ),
        (
            [1],
            replace(GREEDY, stop=("x",)),
            "stop needs the texts of tokens; give the engine a tokenizer, or use stop_token_ids.",
        ),
        (
            ["a"],
            GREEDY,
            (
                "a prompt must be a sequence of token ids; here is a list that is none. Texts are to be "
                "tokenised before."
            ),
        ),
        (
            "ab",
            GREEDY,
            (
                "a prompt must be a sequence of token ids; here is a str that is none. Texts are to be "
                "tokenised before."
            ),
        ),
    ],
)
def test_what_can_never_be_answered_is_refused(prompt: Any, params: SamplingParams, message: str) -> None:
    tried = engine(model("plain"))
    with pytest.raises(ValueError) as raised:
        tried.submit(prompt, params)
    assert str(raised.value) == message
    assert empty(tried)


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)temperature is -1.*min_p is 2.*the prompt is empty"):
        engine(model("plain")).submit([], replace(GREEDY, temperature=-1, min_p=2))


def test_a_prompt_that_the_pool_can_never_hold_is_refused() -> None:
    small = engine(model("CLA"), pages=4 * 5)  # 2 layers of 2 heads: 20 tokens
    small.submit(text(20), GREEDY)
    message = (
        "the prompt has 21 tokens; the cache has room for 20, in 20 pages. Give the engine more memory_bytes."
    )
    with pytest.raises(ValueError) as raised:
        small.submit(text(21), GREEDY)
    assert str(raised.value) == message


def test_a_merging_models_prompt_that_turns_out_too_long_fails_alone() -> None:
    small = engine(model("plain", "dmc"), pages=8 * 3)
    long, short = small.submit(text(100), GREEDY), small.submit(text(4), GREEDY)
    small.run_until_idle()
    completion = long.result(0)
    assert completion.finish_reason == "error"
    assert completion.error is not None
    assert completion.error.startswith(
        "the prompt's 100 tokens do not fit into the cache, whose 24 pages are full after "
    )
    assert completion.error.endswith("; give the engine more memory_bytes.")
    assert short.result(0).finish_reason == "length"
    assert empty(small)


def test_max_tokens_of_prompt_and_answer() -> None:
    tried = Engine(model("plain"), EngineConfig(max_batch_size=2, max_tokens=20))
    assert (tried.limits.context, tried.limits.prompt_tokens, tried.cache.max_tokens) == (20, 19, 20)
    answer = tried.generate([[1] * 15], replace(GREEDY, max_new_tokens=50))[0]
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")
    assert Engine(model("plain"), EngineConfig(max_batch_size=2, max_tokens=999)).limits.context == 128


def test_max_prompt_tokens_and_the_longest_prompt() -> None:
    with pytest.raises(ValueError, match=r"the prompt has 6 tokens; it must have at most 5\."):
        engine(model("plain"), max_prompt_tokens=5).submit([1] * 6, GREEDY)
    assert len(engine(model("plain")).generate([[1] * 127], GREEDY)[0].token_ids) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_batch_size", 0, "max_batch_size is 0; it must be at least 1."),
        ("page_size", 0, "page_size is 0; it must be at least 1."),
        ("max_waiting", 0, "max_waiting is 0; it must be at least 1."),
        ("max_tokens", 1, "max_tokens is 1; it must be at least 2."),
        ("max_prompt_tokens", 0, "max_prompt_tokens is 0; it must be at least 1."),
        ("prefill_chunk", -1, "prefill_chunk is -1; it must be at least 1."),
        ("prefill", "fast", "prefill is 'fast'; it must be 'parallel' or 'exact'."),
        (
            "prefill_tolerance",
            1.0,
            "prefill_tolerance is 1.0; it must be at least 0 (all passes) and below 1.",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        engine(model("plain"), **{field: value})
    assert str(raised.value) == message


def test_a_name_is_given_once_at_a_time() -> None:
    tried = engine(model("plain"))
    tried.submit([1], GREEDY, request_id="mine")
    with pytest.raises(
        ValueError,
        match=r"request_id 'mine' is that of a request that is not finished; give another one, or none\.",
    ):
        tried.submit([1], GREEDY, request_id="mine")
    tried.run_until_idle()
    tried.submit([1], GREEDY, request_id="mine")
    tried.run_until_idle()
    assert empty(tried)


def test_too_many_waiting_requests_are_turned_away() -> None:
    tried = engine(model("plain"), max_batch_size=1, max_waiting=2)
    tried.submit([1], GREEDY)
    tried.submit([1], GREEDY)
    with pytest.raises(
        QueueFullError, match=r"2 requests are waiting, and max_waiting is 2; try again when some are done\."
    ):
        tried.submit([1], GREEDY)
    tried.step()
    tried.submit([1], GREEDY)
    assert (tried.stats().running, tried.stats().waiting) == (1, 2)
    assert len(tried.generate([[1]] * 5, GREEDY)) == 5


def test_an_engine_makes_its_own_cache() -> None:
    built = model("LCKV", "dmc")
    for memory in (100_000, 200_000):
        made = Engine(built, EngineConfig(memory_bytes=memory, max_batch_size=4))
        assert memory * 0.9 < made.cache.num_bytes <= memory
        assert made.cache.max_sequences == 4
        assert len(made.generate([text(3)], GREEDY)[0].token_ids) == 10
    unlimited = Engine(built, EngineConfig(max_batch_size=2))
    assert unlimited.cache.pages == 3 * 2 * 2 * 128 // 16  # what 2 sequences of 128 tokens can ever need
    with pytest.raises(
        ValueError, match=r"memory_bytes is 1000; it must be at least \d+: \d+ for the tables of 64 sequences"
    ):
        Engine(built, EngineConfig(memory_bytes=1000))


def test_a_cache_that_is_too_small_for_the_batch_limits_it() -> None:
    built = model("plain")
    tried = Engine(built, EngineConfig(max_batch_size=5), cache=paged_cache(built, max_sequences=2))
    for _ in range(4):
        tried.submit([1], GREEDY)
    tried.step()
    assert (tried.stats().running, tried.stats().waiting) == (2, 2)
