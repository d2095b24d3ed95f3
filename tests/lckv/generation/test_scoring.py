"""Probabilities of texts through the cache: those of the model without one."""

import pytest
import torch

from lckv.cache.pool import OutOfPagesError
from tests.lckv.cache.models import CASES, model, parallel_logits, text
from tests.lckv.generation.engines import GREEDY, empty, engine

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
