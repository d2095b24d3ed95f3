"""Generation in constant memory: as with the whole context while everything is kept, and on beyond it."""

import json
from pathlib import Path

import pytest

from lckv.generation.engine import Engine
from lckv.generation.loading import load_model
from lckv.generation.sampling import SamplingParams
from tests.lckv.models.tiny import CYCLIC, MERGING, PLAIN, WINDOWS
from tests.tools.model_folders import save_folder
from tools.generate import main
from tools.unbounded import Continuation, streaming_cache


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
    ):
        expected = Engine(model, tokenizer=tokenizer).generate([prompt], params)[0]
        for sinks, chunk in ((4, 512), (0, 2)):
            cache = streaming_cache(model, sinks=sinks, window=40)
            answer = Continuation(model, tokenizer, cache, prompt, params, prefill_chunk=chunk)
            assert "".join(answer) == expected.text
            assert (answer.tokens, answer.finish_reason) == (len(expected.token_ids), expected.finish_reason)


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


def test_memory_does_not_grow_beyond_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path, context=32)
    prompt = "document 3 of the corpus: " * 12
    sizes = []
    for tokens in ("1", "120"):
        options = [
            "--model",
            str(tmp_path),
            "--prompt",
            prompt,
            "--max-new-tokens",
            tokens,
            "--ignore-eos",
            "--seed",
            "1",
        ]
        assert main([*options, "--sinks", "2", "--window", "10", "--prefill-chunk", "16", "--json"]) == 0
        shown = capsys.readouterr()
        content, facts = json.loads(shown.out), json.loads(shown.err.splitlines()[-1])
        assert content["prompt_tokens"] > 32
        assert facts["new_tokens"] == int(tokens)
        sizes.append(facts["cache_bytes"])
    assert sizes[0] == sizes[1]
    assert main([*options, "--window", "10", "--stream"]) == 0
    streamed = capsys.readouterr()
    assert "and the newest 10 tokens, " in streamed.err
    assert main([*options, "--window", "10"]) == 0
    assert capsys.readouterr().out == streamed.out


@pytest.mark.parametrize(
    ("policy", "options", "said"),
    [
        (MERGING, ["--window", "8"], "compression.policy.name is dmc"),
        (
            None,
            ["--window", "61"],
            "--sinks is 4 and --window is 61; together they must be at most the model's context, 64 tokens",
        ),
        (None, ["--window", "8", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_what_cannot_stream(
    policy, options: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path, PLAIN, policy)
    assert main(["--model", str(tmp_path), "--prompt", "hello", *options]) == 2
    assert said in capfd.readouterr().err
