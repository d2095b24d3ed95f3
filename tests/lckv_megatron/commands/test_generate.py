"""Answers on the command line are the engine's; batches keep their order; what cannot be answered is said."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from lckv.generation.engine import Engine
from lckv.generation.loading import load_model
from lckv.generation.sampling import SamplingParams
from lckv_megatron.commands.generate import main
from tests.lckv.models.folders import save_folder
from tests.lckv.models.tiny import CYCLIC, MERGING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cyclic map with merging, and a chat template."""
    folder = tmp_path_factory.mktemp("generate")
    save_folder(folder, CYCLIC, MERGING, chat=True)
    return folder


def expected(folder: Path, prompt: str | list[int], **settings: Any) -> str:
    model, tokenizer = load_model(folder)
    tokens = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
    return Engine(model, tokenizer=tokenizer).generate([tokens], SamplingParams(**settings))[0].text


def run(folder: Path, *options: str) -> int:
    return main(["--model", str(folder), *options])


def test_one_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "--max-new-tokens",
        "12",
        "--temperature",
        "0.9",
        "--top-k",
        "40",
        "--seed",
        "3",
        "--ignore-eos",
    ]
    assert run(folder, "--prompt", "hello world", *settings) == 0
    shown = capsys.readouterr()
    answer = expected(
        folder, "hello world", max_new_tokens=12, temperature=0.9, top_k=40, seed=3, ignore_eos=True
    )
    assert shown.out == f"{answer}\n"
    assert "12 tokens in " in shown.err
    assert "tokens per slot measured; at most " in shown.err and " pages of 1.00 KiB in use" in shown.err
    assert run(folder, "--prompt", "hello world", *settings, "--stream") == 0
    assert capsys.readouterr().out == f"{answer}\n"
    assert run(folder, "--prompt", "hello world", *settings, "--json") == 0
    shown = capsys.readouterr()
    content, facts = json.loads(shown.out), json.loads(shown.err.splitlines()[-1])
    assert content["text"] == answer
    assert (content["finish_reason"], len(content["token_ids"])) == ("length", 12)
    assert facts["new_tokens"] == 12
    assert facts["compression_ratio"] > 1
    assert facts["most_pages_in_use"] * facts["page_bytes"] <= facts["cache_bytes"]


def test_speculation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--prompt", "ab" * 9, "--max-new-tokens", "30", "--seed", "1", "--ignore-eos"]
    guessing = ["--speculation", "prompt_lookup", "--speculation-match", "1", "--speculation-tokens", "3"]
    assert run(folder, *settings) == 0
    plain = capsys.readouterr()
    assert run(folder, *settings, *guessing) == 0
    shown = capsys.readouterr()
    assert shown.out == plain.out
    assert " guessed tokens came. KV cache" in shown.err and "guessed" not in plain.err
    assert run(folder, *settings, *guessing, "--json") == 0
    facts = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert f" {facts['accepted_tokens']} of {facts['drafted_tokens']} guessed" in shown.err


def test_penalties_and_biases(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0", "--max-new-tokens", "12", "--presence-penalty", "1"]
    options += ["--frequency-penalty", "0.5", "--logit-bias", "7=3", "--logit-bias", "9=-100"]
    assert run(folder, "--prompt", "hello", *options) == 0
    answer = expected(
        folder,
        "hello",
        temperature=0,
        max_new_tokens=12,
        presence_penalty=1,
        frequency_penalty=0.5,
        logit_bias={7: 3, 9: -100},
    )
    assert capsys.readouterr().out == f"{answer}\n"
    with pytest.raises(SystemExit):
        run(folder, "--prompt", "hello", "--logit-bias", "7")
    assert "'7' is not TOKEN=X, such as 42=-100" in capsys.readouterr().err


def test_answers_of_a_schema(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema, broken = tmp_path / "schema.json", tmp_path / "broken.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    broken.write_text('{"type": "nothing"}')
    asked = ["--prompt", "hello", "--max-new-tokens", "20", "--json-schema"]
    assert run(folder, *asked, str(schema)) == 0
    assert json.loads(capsys.readouterr().out) in ("yes", "no")
    for option, said in (
        (str(broken), "the prompt cannot be answered: failed to compile JSON schema: Invalid type: nothing"),
        (str(tmp_path / "absent"), "--json-schema"),
    ):
        assert run(folder, *asked, option) == 2
        assert said in capsys.readouterr().err
    assert run(folder, *asked, str(schema), "--window", "9") == 2
    assert "--json-schema is for answers that end; leave out --window" in capsys.readouterr().err


def test_the_standard_input_and_chats(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    greedy = ["--temperature", "0", "--max-new-tokens", "4"]
    assert run(folder, *greedy) == 0
    assert capsys.readouterr().out == expected(folder, "hello\n", temperature=0, max_new_tokens=4) + "\n"
    assert run(folder, *greedy, "--chat", "--system", "word", "--prompt", "hello") == 0
    asked = "[system] word\n[user] hello\n[assistant] "
    assert capsys.readouterr().out == expected(folder, asked, temperature=0, max_new_tokens=4) + "\n"


def test_a_batch(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": "hello world", "id": "first", "max_new_tokens": 9},
        {"messages": [{"role": "user", "content": "corpus"}], "stop": ["e"]},
        {"prompt": "q" * 80, "id": 7},
        {"prompt": "the corpus", "temperature": 0.5, "seed": 4, "logprobs": 1, "max_new_tokens": 3},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    options = [
        "--batch",
        str(path),
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
        "--batch-size",
        "2",
        "--prefill-tolerance=0",
    ]
    assert run(folder, *options, "--output", str(tmp_path / "answers.jsonl")) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in found] == ["first", "3", "7", "7"]
    greedy = {"temperature": 0.0, "max_new_tokens": 5}
    assert found[0]["text"] == expected(folder, "hello world", **{**greedy, "max_new_tokens": 9})
    assert found[1]["text"] == expected(folder, "[user] corpus\n[assistant] ", **greedy, stop=("e",))
    assert "the prompt has 80 tokens; it must have at most 63" in found[2]["error"]
    assert found[3]["text"] == expected(folder, "the corpus", temperature=0.5, seed=4, max_new_tokens=3)
    assert len(found[3]["logprobs"]) == 3
    assert run(folder, *options) == 2
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


def test_failed_prompts_are_counted(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": ""}) + "\n" + json.dumps({"prompt": "word", "max_new_tokens": 2}))
    assert run(folder, "--batch", str(path)) == 2
    shown = capfd.readouterr()
    assert "the prompt is empty" in shown.out
    assert "1 of 2 prompts could not be answered; their lines say why under error" in shown.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "prompts.jsonl:1: not valid JSON"),
        ('"hello"', 'prompts.jsonl:1: an object with either "prompt" or "messages" is needed'),
        ('{"prompt": "a", "messages": []}', 'an object with either "prompt" or "messages" is needed'),
        ('{"prompt": 7}', "prompts.jsonl:1: prompt is 7; it must be a text"),
        (
            '{"prompt": "a", "temprature": 1}',
            "prompts.jsonl:1: 'temprature' is no field; known are prompt, messages, id, temperature",
        ),
        ('{"prompt": "a", "top_p": 2}', "prompts.jsonl:1: top_p is 2; it must be above 0 and at most 1"),
        ('{"messages": "hello"}', "messages must be a list of objects with role and content"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "chat template refuses the messages: no tools"),
        ("", "prompts.jsonl has no prompts"),
        (
            '{"prompt": ' + "[" * 100_000,
            "prompts.jsonl:1: lists or objects in one another, too deep to be read",
        ),
        (
            '{"prompt": "a\\ud800"}',
            "prompts.jsonl:1: prompt: character 1 is U+D800, half of a surrogate pair",
        ),
        ('{"prompt": "a", "id": "\\udfff"}', "prompts.jsonl:1: id: character 0 is U+DFFF"),
        ('{"prompt": "a", "stop": ["\\ud800"]}', "prompts.jsonl:1: stop: character 2 is U+D800"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "is U+D800, half of a surrogate pair"),
    ],
)
def test_bad_batches(
    line: str, said: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    assert run(folder, "--batch", str(path)) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", ""], "the prompt cannot be answered: the prompt is empty"),
        (["--prompt", "q" * 80], "the prompt has 80 tokens; it must have at most 63"),
        (
            ["--prompt", "a", "--temperature", "-1", "--max-new-tokens", "0"],
            "--temperature is -1.0; it must be",
        ),
        (
            ["--prompt", "a", "--temperature", "-1", "--max-new-tokens", "0"],
            "--max-new-tokens is 0; it must be",
        ),
        (
            ["--prompt", "a", "--logit-bias", "x=1"],
            "--logit-bias: logit_bias has the name 'x'; names must be",
        ),
        (["--prompt", "a", "--logit-bias", "1=101"], "--logit-bias is {1: 101.0}; it must be a map"),
        (["--prompt", "a", "--logit-bias", "999999=1"], "logit_bias has 999999; the model's tokens are"),
        (["--prompt", "a", "--presence-penalty", "3"], "--presence-penalty is 3.0; it must be a number from"),
        (["--batch", "nowhere.jsonl"], "--batch nowhere.jsonl cannot be read"),
        (
            ["--batch", "x", "--stream"],
            "--stream prints the answer to one prompt as text; leave out --batch and --json",
        ),
        (["--prompt", "a", "--output", "x"], "--output is for the answers of a --batch"),
        (["--prompt", "a", "--system", "x"], "--system is a message of a chat: add --chat"),
        (["--batch", "x", "--window", "8"], "--window generates from one prompt; leave out --batch"),
        (
            ["--prompt", "a", "--window", "8", "--speculation", "prompt_lookup"],
            "--speculation is prompt_lookup, but --window generates token by token; leave one out",
        ),
        (["--prompt", "a", "--memory", "1KiB"], "the cache cannot be made: memory_bytes is 1024"),
        (["--prompt", "a\udcff"], "--prompt: character 1 is U+DCFF, half of a surrogate pair"),
        (["--prompt", "a", "--chat", "--system", "\udcff"], "--system: character 0 is U+DCFF"),
        (
            ["--prompt", "a", "--stop", "\udcff"],
            "--stop is ('\\udcff',); it must be a tuple of Unicode texts",
        ),
        (["--prompt", "a", "--model", "nowhere"], "nowhere/config.json does not exist"),
    ],
)
def test_bad_input(options: list[str], said: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(folder, *options) == 2
    assert said in capfd.readouterr().err


def test_a_standard_input_that_is_no_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert run(folder) == 2
    assert "the standard input is not UTF-8 text (byte 2)" in capfd.readouterr().err


def test_a_chat_needs_a_template(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path)
    assert run(tmp_path, "--prompt", "a", "--chat") == 2
    assert "the model's tokenizer has no chat template; give plain prompts" in capfd.readouterr().err


def test_damaged_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    assert run(tmp_path, "--prompt", "a") == 2
    assert "model.safetensors is truncated" in capfd.readouterr().err
