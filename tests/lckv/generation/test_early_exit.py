"""Prompts through the engine: layers above all keys and values run for the newest token of a prompt alone, in
its last chunk alone, unless the log-probabilities of its tokens are wanted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lckv.generation.forward import Forward
from lckv.generation.loading import load_model
from lckv.generation.unbounded import Continuation, streaming_cache
from lckv.sharing.early_exit import Results
from tests.lckv.cache.models import CASES, model, text
from tests.lckv.generation.engines import GREEDY, engine
from tests.lckv.models.folders import save_folder
from tests.lckv.models.test_early_exit import fed
from tests.lckv.models.tiny import WINDOWS

PROMPTS = [text(23, 1), text(9, 2), [*text(16, 1), *text(5, 3)], text(2, 4)]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_answers_are_those_of_whole_prompts(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts of different lengths, in chunks, two of which begin alike; alone and together."""
    built, settings = model(name, policy), {"prefill_chunk": 8}
    params = replace(GREEDY, max_new_tokens=4, logprobs=1)
    found = engine(built, **settings).generate(PROMPTS, params)
    alone = [engine(built, **settings).generate([prompt], params)[0] for prompt in PROMPTS]
    call = Forward.__call__

    def whole(self: Forward, sequences: Sequence[int], tokens: Sequence[Sequence[int]], *_: Any) -> Any:
        return call(self, sequences, tokens, Results.ALL)

    monkeypatch.setattr(Forward, "__call__", whole)
    expected = engine(built, **settings).generate(PROMPTS, params)
    for answers in (found, alone):
        for answer, other in zip(answers, expected, strict=True):
            assert answer.token_ids == other.token_ids
            assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_runs_for_a_prompt() -> None:
    """YOCO in chunks of 8: the upper half once, for one token."""
    built, prompt = model("YOCO"), text(19)
    last = replace(GREEDY, max_new_tokens=1)
    lower, upper = range(3), range(3, 6)
    chunk = [(index, 8) for index in lower]
    with fed(built) as calls:
        engine(built, prefill_chunk=8).generate([prompt], last)
    assert calls == [*chunk, *chunk, *((index, 3) for index in lower), *((index, 1) for index in upper)]
    with fed(built) as calls:
        engine(built, prefill="exact").generate([prompt], last)
    assert Counter(calls) == {(index, 1): 19 if index in lower else 1 for index in range(6)}


def test_log_probabilities_of_the_prompt_need_all_tokens() -> None:
    built, prompt = model("YOCO"), text(19)
    params = replace(GREEDY, max_new_tokens=1, prompt_logprobs=1)
    tried = engine(built, prefill_chunk=8)
    with fed(built) as calls:
        (answer,) = tried.generate([prompt], params)
    assert calls == [(index, width) for width in (8, 8, 3) for index in range(6)]
    with torch.inference_mode():
        logprobs = built(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [float(logprobs[place, token]) for place, token in enumerate(prompt[1:])]
    assert [choice.logprob for choice in answer.prompt_logprobs] == pytest.approx(expected, abs=1e-4)
    with fed(built) as calls:
        tried.score([prompt])
    assert {width for index, width in calls if index == 5} == {8, 2}


@pytest.mark.parametrize("policy", ["dense", "dmc"])
def test_a_prompt_that_continues_a_kept_beginning_iterates_its_new_tokens_alone(policy: str) -> None:
    """Passes over the layers of the group see the 7 new tokens, and no others are computed."""
    built, tried = model("LCKV", policy), engine(model("LCKV", policy))
    first, last = text(20), replace(GREEDY, max_new_tokens=1)
    tried.generate([first], last)
    with fed(built) as calls:
        (answer,) = tried.generate([[*first, *text(7, 1)]], last)
    assert answer.cached_tokens == 20 and answer.prefill_passes == 9
    passes = Counter(calls)
    assert passes == {(0, 7): 1, (1, 7): 9, (2, 7): 9, (3, 7): 9, (4, 7): 1, (5, 1): 1}


def test_without_end(tmp_path: Any) -> None:
    save_folder(tmp_path, WINDOWS)
    built, tokenizer = load_model(tmp_path)
    cache = streaming_cache(built, sinks=2, window=20)
    prompt = text(11)
    with fed(built) as calls:
        continuation = Continuation(built, tokenizer, cache, prompt, GREEDY, prefill_chunk=4)
        with torch.inference_mode():
            logits = continuation._prefill()
    assert calls == [(0, 4), (1, 4), (0, 4), (1, 4), (0, 3), (1, 3), (2, 1), (3, 1)]
    whole = streaming_cache(built, sinks=2, window=20)
    with torch.inference_mode():
        states = built.model.run(built.model.embed_tokens(torch.tensor([prompt])), whole).last_hidden_state
        torch.testing.assert_close(logits, built.lm_head(states[:, -1]), rtol=0, atol=5e-4)
