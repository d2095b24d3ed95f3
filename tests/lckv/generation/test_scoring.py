"""Probabilities of texts through the cache: those of the model without one."""

from collections.abc import Sequence
from typing import cast

import pytest
import torch

from lckv.cache.pool import OutOfPagesError
from lckv.generation.engine import Engine
from lckv.generation.forward import Forward
from lckv.generation.scoring import Scores
from tests.lckv.cache.models import CASES, model, parallel_logits, text
from tests.lckv.generation.engines import GREEDY, empty, engine
from tests.thinning import thinned

TEXTS = [text(length, seed=length) for length in (9, 1, 17, 2, 17)]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_scores_are_those_of_the_whole_text(name: str, policy: str) -> None:
    built = model(name, policy)
    tried = engine(built, prefill_chunk=8)  # exact for iterated maps: fewer tokens than passes
    in_chunks, one_by_one = (tried.score(TEXTS, token_by_token=each) for each in (False, True))
    for tokens, *found in zip(TEXTS, in_chunks, one_by_one, strict=True):
        logprobs = parallel_logits(built, tokens)[:-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
        greedy = logprobs.argmax(-1) == torch.tensor(tokens[1:])
        for scores in found:
            torch.testing.assert_close(scores.logprobs, expected, rtol=0, atol=2e-5)
            assert scores.greedy.tolist() == greedy.tolist()
    assert empty(tried)


def test_what_was_generated_greedily_is_greedy() -> None:
    tried = engine(model("plain"))
    answer = tried.generate([text(6)], GREEDY)[0].token_ids
    scores = tried.score([[*text(6), *answer]])[0]
    assert scores.greedy[5:].all()


def test_requests_that_run_make_room_and_go_on_afterwards() -> None:
    built = model("CLA")
    expected = engine(built).generate([text(9)], GREEDY)[0].token_ids
    tried = engine(built, pages=4 * 8)  # of 2 layers, 2 heads: 32 tokens
    request = tried.submit(text(9), GREEDY)
    for _ in range(4):
        tried.step()
    alone = engine(built).score([text(32)])[0]
    torch.testing.assert_close(tried.score([text(32)])[0].logprobs, alone.logprobs, rtol=0, atol=1e-6)
    tried.run_until_idle()
    assert request.result(0).token_ids == expected
    assert empty(tried)


def test_texts_share_the_cache_as_far_as_there_is_room() -> None:
    built = model("plain")
    expected = engine(built).score(TEXTS)
    small = engine(built, pages=8 * 8)  # 32 tokens
    for scores, right in zip(small.score(TEXTS), expected, strict=True):
        torch.testing.assert_close(scores.logprobs, right.logprobs, rtol=0, atol=1e-5)
    assert empty(small)


def test_compression_is_measured_while_texts_are_scored() -> None:
    tried = engine(model("plain", "dmc"))
    tried.score([text(30)])
    assert tried.stats().compression_ratio > 1.5


def test_a_text_may_fill_the_context() -> None:
    assert len(engine(model("plain")).score([[1] * 128])[0].logprobs) == 127


def test_texts_that_cannot_be_scored_are_refused() -> None:
    tried = engine(model("plain"))
    message = (
        r"(?s)text 0 is empty; it must have.*text 2's token 1 is 99.*"
        r"text 3 has 129 tokens; it must have at most 128\."
    )
    with pytest.raises(ValueError, match=message):
        tried.score([[], [1], [1, 99], [1] * 129])
    assert tried.score([]) == []


def test_a_merging_models_text_that_turns_out_too_long_says_so_and_leaves_nothing() -> None:
    small = engine(model("plain", "dmc"), pages=8 * 3)
    with pytest.raises(OutOfPagesError):
        small.score([text(4), text(100)])
    assert empty(small)


def _computed(tried: Engine, texts: Sequence[Sequence[int]], **options: bool) -> tuple[int, list[Scores]]:
    """Tokens that scoring computes, padding left out, and the scores."""
    counts: list[int] = []
    call = tried._forward

    class Watched:
        model = call.model

        def __call__(self, sequences: Sequence[int], tokens: Sequence[Sequence[int]]) -> object:
            counts.extend(map(len, tokens))
            return call(sequences, tokens)

    tried._forward = cast(Forward, Watched())
    scores = tried.score(texts, **options)
    tried._forward = call
    return sum(counts), scores


SHOTS = text(17, 50)
QUESTIONS = [[*SHOTS, *text(length, length)] for length in (6, 9, 11)]
CHOICES = [
    *([*question, *text(length, 60 + length)] for question in QUESTIONS for length in (1, 2, 5, 1)),
    QUESTIONS[1],
    [*QUESTIONS[0], 9, 1, 2, 3],
    text(7, 51),
]


# Three and the two chunks have no common divisor: by day there are both, with both policies.
@pytest.mark.parametrize(
    ("name", "policy", "chunk"), thinned([(*case, chunk) for case in CASES for chunk in (8, 512)], 3)
)
def test_what_texts_begin_with_is_computed_once(name: str, policy: str, chunk: int) -> None:
    """Few-shot examples, questions and their choices: each piece of them once, but for what is shorter than a
    page of 4 tokens."""
    built = model(name, policy)
    exact = built.model.layer_types.any_cyclic and chunk == 512
    tried, alone = (engine(built, prefill_chunk=chunk) for _ in range(2))
    computed, together = _computed(tried, CHOICES, token_by_token=exact)
    for tokens, scores in zip(CHOICES, together, strict=True):
        expected = alone.score([tokens], token_by_token=exact)[0]
        torch.testing.assert_close(scores.logprobs, expected.logprobs, rtol=0, atol=2e-5)
        assert torch.equal(scores.greedy, expected.greedy) and len(scores.logprobs) == len(tokens) - 1
    # The examples, the questions, of choices of 1, 2 and 5 tokens all but the last one, and three more texts.
    assert computed == 17 + (6 + 9 + 11) + 3 * (0 + 1 + 4) + 3 + 6
    assert empty(tried)


def test_any_texts_are_scored_as_alone() -> None:
    built = model("CLA")
    alone = engine(built)
    rows = [[], [1, 2, 3], [1, 2, 3, 4, 5], [1] * 9, [1, 2, 3, 4, 5, 6, 7, 8], text(12, 3), text(30, 4)]
    texts = [[*start, *end] for start in rows for end in ([2], [2, 2], [3, 1, 2, 5, 6], text(9, 5))]
    texts += texts[3:9]
    expected = [alone.score([tokens])[0] for tokens in texts]
    for pages, chunk in ((2000, 512), (44, 512), (44, 5)):
        tried = engine(built, pages=pages, prefill_chunk=chunk)
        for scores, right in zip(tried.score(texts), expected, strict=True):
            torch.testing.assert_close(scores.logprobs, right.logprobs, rtol=0, atol=2e-5)
        assert empty(tried)


@pytest.mark.parametrize("policy", ["dense", "dmc"])
def test_a_text_that_fits_only_without_what_others_begin_with_is_scored_at_last(policy: str) -> None:
    """The beginning holds 18 tokens' pages, and the longest text needs all pages for itself."""
    built = model("plain", policy)
    roomy = engine(built)
    start, long = text(18, 1), text(30, 2)
    texts = [[*start, *text(6, 3)], [*start, *long], [*start, *long[:25], *text(9, 4)]]
    expected = roomy.score(texts)
    sequence = roomy.cache.open()
    roomy._forward([sequence], [texts[1][:-1]])
    small = engine(built, pages=roomy.cache.pages_in_use + (8 if policy == "dense" else 12))
    for scores, right in zip(small.score(texts), expected, strict=True):
        torch.testing.assert_close(scores.logprobs, right.logprobs, rtol=0, atol=2e-5)
    assert empty(small)


def test_scoring_reads_nothing_of_requests_and_leaves_what_it_can() -> None:
    """Requests that run are set aside, and what they had computed is found again."""
    tried = engine(model("plain"), prefill_chunk=8)
    request = tried.submit(text(30, 1), GREEDY)
    for _ in range(3):
        tried.step()
    assert _computed(tried, [text(30, 1)])[0] == 29
    assert tried.stats().pages_kept == 8 * 6
    tried.run_until_idle()
    assert request.result(0).token_ids == engine(model("plain")).generate([text(30, 1)], GREEDY)[0].token_ids
    assert (tried.stats().cached_prompt_tokens, request.result(0).preemptions) == (0, 1)
    tight = engine(model("plain"), pages=8 * 10)
    tight.generate([text(20, 1)], GREEDY)
    assert len(tight.score([text(40, 2)])[0].logprobs) == 39
    assert empty(tight)
