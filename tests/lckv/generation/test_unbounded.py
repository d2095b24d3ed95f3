"""Generation in constant memory: as with the whole context while everything is kept, and on beyond it."""

from pathlib import Path

import pytest

from lckv.generation.engine import Engine
from lckv.generation.loading import load_model
from lckv.generation.sampling import SamplingParams
from lckv.generation.unbounded import Continuation, streaming_cache
from tests.lckv.models.folders import save_folder
from tests.lckv.models.tiny import CYCLIC, MERGING, PLAIN, WINDOWS


@pytest.mark.parametrize("layer_types", [PLAIN, CYCLIC, WINDOWS])
def test_it_is_the_engines_answer_while_everything_is_kept(layer_types: str | None, tmp_path: Path) -> None:
    save_folder(tmp_path, layer_types)
    model, tokenizer = load_model(tmp_path)
    prompt = tokenizer("hello world").input_ids
    for params in (
        SamplingParams(0.0, max_new_tokens=20, ignore_eos=True),
        SamplingParams(
            1.0, top_k=50, seed=4, max_new_tokens=20, repetition_penalty=1.3, stop=("o", "a", "e")
        ),
        SamplingParams(
            0.0, max_new_tokens=20, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={prompt[0]: 2.0}
        ),
    ):
        expected = Engine(model, tokenizer=tokenizer).generate([prompt], params)[0]
        for sinks, chunk in ((4, 512), (0, 2)):
            cache = streaming_cache(model, sinks=sinks, window=40)
            answer = Continuation(model, tokenizer, cache, prompt, params, prefill_chunk=chunk)
            assert "".join(answer) == expected.text
            assert (answer.tokens, answer.finish_reason) == (len(expected.token_ids), expected.finish_reason)


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    model = save_folder(tmp_path)
    _, tokenizer = load_model(tmp_path)
    cache = streaming_cache(model, sinks=1, window=30)
    for params in (SamplingParams(logit_bias={10**6: 1.0}), SamplingParams(stop_token_ids=(10**6,))):
        with pytest.raises(ValueError, match="has 1000000; the model's tokens are 0 to "):
            Continuation(model, tokenizer, cache, [1], params)
    with pytest.raises(ValueError, match="prompt_logprobs must be None here; the engine"):
        Continuation(model, tokenizer, cache, [1], SamplingParams(prompt_logprobs=0))
    with pytest.raises(ValueError, match=r"temperature is -1\.0; it must be 0 \(greedy\)"):
        Continuation(model, tokenizer, cache, [1], SamplingParams(temperature=-1.0))


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    model = save_folder(tmp_path)
    _, tokenizer = load_model(tmp_path)
    model.model.norm.weight.data.fill_(float("nan"))
    cache = streaming_cache(model, sinks=1, window=30)
    with pytest.raises(ArithmeticError, match="the model's logits are not finite"):
        list(Continuation(model, tokenizer, cache, [1], SamplingParams(0.0, max_new_tokens=2)))


def test_the_end_of_a_document_ends_it(tmp_path: Path) -> None:
    model = save_folder(tmp_path)
    _, tokenizer = load_model(tmp_path)
    prompt, greedy = tokenizer("hello world").input_ids, SamplingParams(0.0, max_new_tokens=6)
    tokens = Engine(model).generate([prompt], greedy)[0].token_ids
    model.config.eos_token_id = [tokens[3]]
    for ends, length in ((False, tokens.index(tokens[3]) + 1), (True, 6)):
        params = SamplingParams(0.0, max_new_tokens=6, ignore_eos=ends)
        cache = streaming_cache(model, sinks=1, window=30)
        answer = Continuation(model, tokenizer, cache, prompt, params)
        list(answer)
        assert (answer.tokens, answer.finish_reason) == (length, "length" if ends else "stop")


@pytest.mark.parametrize(
    ("policy", "window", "said"),
    [
        (MERGING, 8, "the KV policy is dmc; streaming with attention sinks drops single tokens"),
        (
            None,
            61,
            "sinks is 4 and window is 61; together they must be at most the model's context, 64 tokens",
        ),
    ],
)
def test_what_cannot_stream(policy, window: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        streaming_cache(save_folder(tmp_path, PLAIN, policy), sinks=4, window=window)
