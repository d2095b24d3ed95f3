"""Conversations made into a dataset by the program."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lckv_megatron.commands.preprocess import main
from megatron_ext.data.chat import ChatTokenizer
from megatron_ext.data.description import read_manifest
from megatron_ext.data.documents import DocumentReader
from megatron_ext.data.marks import unmarked
from tests.megatron_ext.data.builders import CHATML, save_tokenizer

CHATS = [
    [
        {"role": "user", "content": f"question {number}" + "?" * (number % 5)},
        {"role": "assistant", "content": f"answer {number}"},
    ]
    for number in range(40)
]


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_tokenizer(tmp_path / "tokenizer", CHATML)


def lines(chats: list[Any], **more: Any) -> bytes:
    return b"".join(json.dumps({"messages": chat, **more}).encode() + b"\n" for chat in chats)


def run(*arguments: str) -> int:
    options = ["--tokenizer-type", "huggingface", "--tokenizer-model", "tokenizer"]
    return main(["--data-format", "chat", *options, "--output-prefix", "chats", *arguments])


def stored(prefix: str = "chats") -> list[list[int]]:
    manifest = read_manifest(prefix)
    assert manifest is not None
    reader = DocumentReader(prefix)
    return [reader.read(number, 0, None).tolist() for number in range(manifest.documents)]


def expected(folder: Path, chats: list[Any]) -> list[list[int]]:
    """Tokens as the template of transformers makes them; -1 - t where nothing is learned: all but what comes
    behind the words of the assistant, and the end of its turn."""
    tokenizer = ChatTokenizer(folder)._tokenizer
    documents = []
    for chat in chats:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        split = text.index("answer")
        unlearned, learned = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[:split], text[split:])
        )
        assert learned[-2] == tokenizer.eos_token_id
        learned[-1] = -1 - learned[-1]  # the line break between turns
        documents.append([-1 - token for token in unlearned] + learned)
    return documents


@pytest.mark.parametrize("options", [[], ["--workers", "2"]])
def test_conversations_of_all_kinds_of_files(options: list[str], tokenizer: Path) -> None:
    Path("a.jsonl").write_bytes(lines(CHATS[:10]))
    Path("b.jsonl.gz").write_bytes(gzip.compress(lines(CHATS[10:20])))
    Path("c.jsonl.zst").write_bytes(zstandard.compress(lines(CHATS[20:30])))
    nested = pa.table({"messages": CHATS[30:35], "id": [*range(5)]})
    texts = pa.table({"messages": [json.dumps(chat) for chat in CHATS[35:]]})
    pq.write_table(nested, "d.parquet")
    pq.write_table(texts, "e.parquet")
    assert run("--input", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.parquet", *options) == 0
    documents = expected(tokenizer, CHATS)
    assert stored() == documents
    manifest = read_manifest("chats")
    assert manifest is not None
    assert manifest.data_format == "chat"
    assert manifest.chat_template == ChatTokenizer(tokenizer).template
    assert (manifest.dtype, manifest.append_eod, manifest.json_key) == ("int32", False, "messages")
    assert manifest.max_token_id == max(int(unmarked(np.array(document)).max()) for document in documents)


def test_sharegpt_and_shards(tokenizer: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    turns = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
    Path("a.jsonl").write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in turns))
    assert run("--input", "a.jsonl", "--json-keys", "conversations", "--shards", "3") == 0
    assert [*stored("chats-00000"), *stored("chats-00001"), *stored("chats-00002")] == expected(
        tokenizer, CHATS
    )
    assert run("--input", "a.jsonl", "--json-keys", "conversations", "--shards", "3") == 0
    assert main(["--merge", "--input", "chats-*.idx", "--output-prefix", "merged"]) == 0
    assert stored("merged") == expected(tokenizer, CHATS)


def test_tools_reach_the_template(tokenizer: Path) -> None:
    template = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + CHATML
    (tokenizer / "chat_template.jinja").write_text(template)
    tool = {"type": "function", "function": {"name": "adder", "description": "", "parameters": {}}}
    Path("a.jsonl").write_bytes(lines(CHATS[:1], tools=[tool]))
    assert run("--input", "a.jsonl") == 0
    text = ChatTokenizer(tokenizer)._tokenizer.decode(unmarked(np.array(stored()[0])))
    assert text.startswith("adder <|start|>user")


def test_bad_records_are_named_or_counted(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        [],
        CHATS[0][:1],
        [{"role": "user", "content": "a <|end|>"}, CHATS[0][1]],
        [CHATS[0][0], {"role": "assistant", "content": "", "tool_calls": [{"id": "<|start|>"}]}],
    ]
    Path("a.jsonl").write_bytes(lines([CHATS[0], *bad, CHATS[1]]))
    assert run("--input", "a.jsonl") == 2
    assert "error: a.jsonl:2: 'messages' is an empty list" in capsys.readouterr().err
    assert run("--input", "a.jsonl", "--skip-bad-lines") == 0
    assert "4 bad records skipped" in capsys.readouterr().out
    assert stored() == expected(tokenizer, CHATS[:2])
    for chat, said in zip(
        bad[1:],
        [
            "no message is the assistant's",
            "content of message 0 holds the special token '<|end|>'",
            "tool_calls of message 1 holds the special token '<|start|>'",
        ],
        strict=True,
    ):
        Path("b.jsonl").write_bytes(lines([CHATS[0], chat]))
        assert run("--input", "b.jsonl", "--overwrite") == 2
        assert f"error: b.jsonl:2: {said}" in capsys.readouterr().err


def test_another_template_is_another_job(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_bytes(lines(CHATS))
    assert run("--input", "a.jsonl") == 0
    (tokenizer / "chat_template.jinja").write_text(CHATML.replace("<|start|>", "<|start|> "))
    assert run("--input", "a.jsonl") == 2
    assert "chats is of another job: chat_template differs." in capsys.readouterr().err
    (tokenizer / "chat_template.jinja").unlink()
    assert run("--input", "a.jsonl", "--overwrite") == 2
    assert "has no chat template; put it into chat_template.jinja there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--input", "a.jsonl", "--append-eod"],
            "--data-format chat with --append-eod: the chat template ends",
        ),
        (["--input", "a.jsonl", "--json-keys", "a", "b"], "a record has one conversation; give one key."),
        (["--input", "a.txt"], "--data-format chat needs JSON lines or Parquet files, but a.txt is a text."),
        (
            ["--input", "a.jsonl", "--tokenizer-type", "tiktoken"],
            "conversations need a Hugging Face folder (--tokenizer-type huggingface)",
        ),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], said: str, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.jsonl").write_bytes(lines(CHATS))
    Path("a.txt").write_text("hello")
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
