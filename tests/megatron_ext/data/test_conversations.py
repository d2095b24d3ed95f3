"""Conversations as they are written in records."""

import json
from typing import Any

import pytest

from megatron_ext.data.conversations import parse_chat
from megatron_ext.data.records import BadRecordError, Record

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "good day"}


def line(value: Any) -> Record:
    return Record("a.jsonl", 3, json.dumps(value).encode())


def test_messages_and_tools() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    chat = parse_chat(line({"chat": [USER, call, ASSISTANT], "tools": [tool], "id": 4}), "chat")
    assert chat.messages == [USER, {**call, "content": ""}, ASSISTANT]
    assert chat.tools == [tool]
    assert parse_chat(line({"chat": [USER], "tools": json.dumps([tool])}), "chat").tools == [tool]
    assert parse_chat(line({"chat": [USER]}), "chat").tools is None


def test_sharegpt() -> None:
    turns = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "good day", "weight": 1},
    ]
    messages = parse_chat(line({"conversations": turns}), "conversations").messages
    assert messages == [{"role": "system", "content": "be kind"}, USER, {**ASSISTANT, "weight": 1}]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("hello", "'messages' is not a list of messages but str."),
        (None, "'messages' is not a list of messages but NoneType."),
        ([], "'messages' is an empty list; a conversation has messages."),
        ([USER, "hello"], "message 1 is not an object but str."),
        ([{"content": "hello"}], "message 0 has no 'role'; its keys are 'content'."),
        (
            [{"role": "Assistant", "content": "x"}],
            "message 0 has the role 'Assistant'; known are system, developer, user, assistant, tool.",
        ),
        (
            [{"from": "bing", "value": "x"}],
            "message 0 is from 'bing'; known are system, human, user, gpt, assistant, tool.",
        ),
        ([USER, {"role": "assistant"}], "'content' of message 1 is not a text but NoneType."),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "'content' of message 0 is not a text but list.",
        ),
        (
            [USER, {**ASSISTANT, "tool_calls": [{"function": {"arguments": "\ud800"}}]}],
            (
                "'tool_calls' of message 1: character 0 is U+D800, half of a surrogate pair, which is no "
                "character."
            ),
        ),
    ],
)
def test_what_is_no_conversation(value: Any, said: str) -> None:
    with pytest.raises(BadRecordError) as error:
        parse_chat(line({"messages": value}), "messages")
    assert str(error.value) == f"a.jsonl:3: {said}"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (line({"text": "x"}), "a.jsonl:3: no key 'messages'; the keys are 'text'."),
        (line({"messages": [USER], "tools": {}}), "a.jsonl:3: 'tools' is not a list but dict."),
        (line({"messages": [USER], "tools": "["}), "a.jsonl:3: 'tools' is not valid JSON"),
        (line([USER]), "a.jsonl:3: a JSON object is needed, not list."),
        (Record("a.jsonl", 3, b"", problem="too long"), "a.jsonl:3: too long"),
        (Record("a.parquet", 3, b"", (b"[" * 100_000, None)), "a.parquet:3: 'messages' is not valid JSON"),
        (
            Record("a.parquet", 3, b"", (None, None)),
            "a.parquet:3: 'messages' is not a list of messages but None",
        ),
    ],
)
def test_records_without_a_conversation(record: Record, said: str) -> None:
    with pytest.raises(BadRecordError) as error:
        parse_chat(record, "messages")
    assert str(error.value).startswith(said)
