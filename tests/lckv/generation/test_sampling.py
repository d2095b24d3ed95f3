"""Choosing tokens: the filters of transformers, the distribution that is left of the logits, and rows that
know nothing of each other."""

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lckv.generation.sampling import Choice, SamplingParams, filtered, sample

VOCABULARY = 50


def _logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def _of_transformers(params: SamplingParams) -> LogitsProcessorList:
    biases = {(token,): float(bias) for token, bias in (params.logit_bias or {}).items()}
    processors: list[Any] = [SequenceBiasLogitsProcessor(biases)] if biases else []
    processors += [
        RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        TemperatureLogitsWarper(params.temperature),
    ]
    processors += [] if params.top_k is None else [TopKLogitsWarper(params.top_k)]
    processors += [] if params.top_p == 1 else [TopPLogitsWarper(params.top_p)]  # as `generate` does
    processors += [MinPLogitsWarper(params.min_p)]
    return LogitsProcessorList(processors)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 5, 49, 80]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.8]),
    logit_bias=st.none()
    | st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.5, 2.0, 100.0])),
)


@given(params=st.lists(PARAMS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_filters_are_those_of_transformers(params: list[SamplingParams], seed: int) -> None:
    logits = _logits(len(params), seed)
    previous = torch.randint(VOCABULARY, (len(params), 6), generator=torch.Generator().manual_seed(seed))
    ours = filtered(logits, params, previous.tolist())
    theirs = [
        _of_transformers(each)(previous[row][None], logits[row][None])[0] for row, each in enumerate(params)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-6, atol=1e-6)


@given(
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    answers=st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=30), min_size=1, max_size=4),
)
def test_penalties_are_those_of_openai(presence: float, frequency: float, answers: list[list[int]]) -> None:
    """Its formula, token by token; prompts do not count."""
    logits = _logits(len(answers))
    params = [SamplingParams(presence_penalty=presence, frequency_penalty=frequency)] * len(answers)
    expected = logits.clone()
    for row, answer in enumerate(answers):
        for token in range(VOCABULARY):
            times = answer.count(token)
            expected[row, token] -= times * frequency + (times > 0) * presence
    previous = [[1, 2, 2, *answer] for answer in answers]
    ours = filtered(logits, params, previous, [Counter(answer) for answer in answers])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)


def test_the_logits_themselves_are_not_changed() -> None:
    logits = _logits(2)
    before = logits.clone()
    params = SamplingParams(logit_bias={1: 5.0}, presence_penalty=1.0, repetition_penalty=2.0, logprobs=1)
    sample(logits, [params] * 2, [Random("1")] * 2, [[3]] * 2, [{4: 1}] * 2)
    assert torch.equal(logits, before)


def test_equal_logits_are_kept_or_dropped_together_by_top_k() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    kept = filtered(logits, [SamplingParams(top_k=2)], [[]]).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


def test_the_most_probable_token_is_always_left() -> None:
    logits = torch.tensor([[-1e4, 5.0, -1e4], [0.0, 0.0, 0.0]])
    kept = filtered(logits, [SamplingParams(top_p=1e-99)] * 2, [[], []]).isfinite()
    assert kept.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=2.0, top_k=12, top_p=0.9),
        SamplingParams(temperature=3.0, min_p=0.03),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(params: SamplingParams) -> None:
    draws = 5_000
    logits = _logits(1)
    expected = filtered(logits, [params], [[]])[0].softmax(-1) * draws
    generators = [Random(f"{seed}") for seed in range(draws)]
    chosen = sample(logits.expand(draws, -1), [params] * draws, generators, [()] * draws)
    counts = torch.bincount(torch.tensor([choice.token for choice in chosen]), minlength=VOCABULARY).float()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    statistic = float(((counts - expected)[common].square() / expected[common]).sum())
    degrees = int(common.sum()) - 1
    assert degrees >= 5
    # Beyond 4 standard deviations of a chi-square: less than once in 10,000 seeds.
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@given(params=st.lists(PARAMS, min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_the_others(params: list[SamplingParams], seed: int) -> None:
    params = [replace(each, temperature=0.0) if seed % 3 == row else each for row, each in enumerate(params)]
    logits = _logits(len(params), seed)
    previous = [list(range(row)) for row in range(len(params))]
    together = sample(logits, params, [Random(str(row)) for row in range(len(params))], previous)
    for row, each in enumerate(params):
        assert sample(logits[row : row + 1], [each], [Random(str(row))], previous[row : row + 1]) == [
            together[row]
        ]


@pytest.mark.parametrize(("temperature", "numbers"), [(0.0, 0), (1.0, 1)])
def test_a_generator_gives_one_number_for_each_token_that_is_drawn(temperature: float, numbers: int) -> None:
    generator, other = Random("1"), Random("1")
    sample(_logits(1), [SamplingParams(temperature=temperature)], [generator], [[]])
    for _ in range(numbers):
        other.random()
    assert generator.random() == other.random()


def test_greedy_takes_the_best_after_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.5)
    assert sample(logits, [greedy], [Random()], [[]]) == [Choice(0)]
    assert sample(logits, [greedy], [Random()], [[0]]) == [Choice(1)]


def test_the_extremes_of_the_generator_give_tokens_that_can_be_chosen() -> None:
    class Fixed(Random):
        def __init__(self, number: float) -> None:
            self.number = number

        def random(self) -> float:
            return self.number

    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).nan_to_num(neginf=-1e30)
    params = [SamplingParams(top_k=2)]
    assert [sample(logits, params, [Fixed(u)], [[]])[0].token for u in (0.0, 0.49, 0.51, 1 - 2**-53)] == [
        1,
        1,
        2,
        2,
    ]


def test_logprobs_are_those_of_the_model_before_any_setting() -> None:
    logits = _logits(3)
    wants = SamplingParams(temperature=0.2, top_k=1, logprobs=4)
    chosen = sample(
        logits,
        [wants, replace(wants, logprobs=0), replace(wants, logprobs=None)],
        [Random("1")] * 3,
        [[]] * 3,
    )
    logprobs = logits.log_softmax(-1)
    best = logprobs[0].topk(4)
    assert chosen[0].logprob == pytest.approx(float(logprobs[0, chosen[0].token]))
    assert [token for token, _ in chosen[0].top_logprobs] == best.indices.tolist()
    assert [number for _, number in chosen[0].top_logprobs] == pytest.approx(best.values.tolist())
    assert chosen[1].logprob is not None and chosen[1].top_logprobs == ()
    assert chosen[2].logprob is None


def test_more_logprobs_than_the_vocabulary_has_are_all() -> None:
    chosen = sample(torch.randn(1, 5), [SamplingParams(logprobs=20)], [Random()], [[]])
    assert len(chosen[0].top_logprobs) == 5


@pytest.mark.parametrize(
    ("field", "value", "relation"),
    [
        ("temperature", -0.1, "0 (greedy), or from 1e-15 to 1e+15"),
        ("temperature", float("nan"), "0 (greedy), or from 1e-15 to 1e+15"),
        ("temperature", 1e-38, "0 (greedy), or from 1e-15 to 1e+15"),
        ("temperature", 1e39, "0 (greedy), or from 1e-15 to 1e+15"),
        ("temperature", "1", "0 (greedy), or from 1e-15 to 1e+15"),
        ("top_k", 0, "an integer of at least 1, or None"),
        ("top_k", 2.0, "an integer of at least 1, or None"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", -0.1, "at least 0 and at most 1"),
        ("repetition_penalty", 0.0, "from 1e-15 to 1e+15 (1: no penalty)"),
        ("repetition_penalty", float("inf"), "from 1e-15 to 1e+15 (1: no penalty)"),
        ("repetition_penalty", 1e-40, "from 1e-15 to 1e+15 (1: no penalty)"),
        ("seed", 1.5, "an integer, or None"),
        ("presence_penalty", 2.1, "a number from -2 to 2 (0: no penalty)"),
        ("frequency_penalty", float("nan"), "a number from -2 to 2 (0: no penalty)"),
        ("logit_bias", {1: 101}, "a map of tokens to numbers from -100 to 100, or None"),
        ("logit_bias", {"1": 1}, "a map of tokens to numbers from -100 to 100, or None"),
        ("logit_bias", ((1, 1),), "a map of tokens to numbers from -100 to 100, or None"),
        ("max_new_tokens", 0, "an integer of at least 1"),
        ("max_new_tokens", True, "an integer of at least 1"),
        ("stop", ("",), "a tuple of Unicode texts that are not empty"),
        ("stop", "end", "a tuple of Unicode texts that are not empty"),
        ("stop_token_ids", ("a",), "a tuple of integers"),
        ("ignore_eos", 1, "true or false"),
        ("logprobs", 21, "an integer from 0 to 20, or None"),
        ("logprobs", -1, "an integer from 0 to 20, or None"),
        ("prompt_logprobs", 21, "an integer from 0 to 20, or None"),
    ],
)
def test_what_is_wrong_with_settings_is_said(field: str, value: Any, relation: str) -> None:
    assert SamplingParams(**{field: value}).problems() == [f"{field} is {value!r}; it must be {relation}."]


def test_an_integer_that_no_double_holds_is_none_of_the_numbers() -> None:
    huge = 10**400
    wrong = SamplingParams(temperature=huge, logit_bias={1: huge}, presence_penalty=huge).problems()
    assert [problem.split()[0] for problem in wrong] == ["temperature", "presence_penalty", "logit_bias"]


@pytest.mark.parametrize("temperature", [1e-15, 1e15])
@pytest.mark.parametrize("penalty", [1e-15, 1e15])
def test_at_the_ends_of_the_ranges_tokens_are_tokens(temperature: float, penalty: float) -> None:
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, logit_bias={0: 100, 1: -100}, top_p=0.9
    )
    assert params.problems() == []
    (left,) = filtered(_logits(1), [params], [[0, 1, 2, 3]])
    assert left.softmax(-1).isfinite().all()
    (choice,) = sample(_logits(1), [params], [Random(1)], [[0, 1, 2, 3]])
    assert 0 <= choice.token < VOCABULARY


def test_right_settings_have_no_problems_and_wrong_ones_are_all_named() -> None:
    assert (
        SamplingParams(
            temperature=0, top_k=3, seed=-4, stop=("a",), stop_token_ids=(1,), logprobs=0
        ).problems()
        == []
    )
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=0).problems() == []
    assert len(SamplingParams(temperature=-1, top_p=2, max_new_tokens=0).problems()) == 3
