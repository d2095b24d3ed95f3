"""generate --window: memory that does not grow."""

import json
from pathlib import Path

import pytest

from lckv_megatron.commands.generate import main
from tests.lckv.models.folders import save_folder
from tests.lckv.models.tiny import MERGING, PLAIN


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
        (MERGING, ["--window", "8"], "--window: the KV policy is dmc; streaming"),
        (
            None,
            ["--window", "61"],
            "--window: sinks is 4 and window is 61; together they must be at most",
        ),
        (None, ["--window", "8", "--logit-bias", "999999=1"], "answered: logit_bias has 999999; the model's"),
        (None, ["--window", "8", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_what_cannot_stream(
    policy, options: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(tmp_path, PLAIN, policy)
    assert main(["--model", str(tmp_path), "--prompt", "hello", *options]) == 2
    assert said in capfd.readouterr().err
