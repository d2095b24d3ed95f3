"""Conversations in records: lists of messages under a key, and the tools that the assistant may call.

A message has "role" and "content", as chat templates read them, or "from" and "value" (ShareGPT).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lckv.surrogates import lone_surrogate
from megatron_ext.data.parquet import Column, JsonColumn
from megatron_ext.data.records import BadRecordError, Record, parse_object, value_of_key

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOLS_KEY = "tools"
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}

Messages = Sequence[Mapping[str, Any]]
"""Turns, each with "role" and "content", and whatever else the template reads."""


class Chat(NamedTuple):
    """A conversation as it was written."""

    messages: Messages
    tools: Sequence[Any] | None
    """As the chat template takes them; None: there are none."""


class _BadChatError(ValueError):
    """What is wrong with a conversation."""


def columns_of(key: str) -> tuple[Column, ...]:
    """The columns of a Parquet file that hold conversations."""
    return (JsonColumn(key), JsonColumn(TOOLS_KEY, optional=True))


def parse_chat(record: Record, key: str) -> Chat:
    """The conversation under `key` of a record: a line of JSON, or a row of the columns `columns_of(key)`.

    Raises BadRecordError, with file and line, where it is no list of messages with known roles and texts.
    """
    if record.problem:
        raise BadRecordError(f"{record.place}: {record.problem}")
    try:
        messages, tools = _values(record, key)
        return Chat(_messages(messages, key), _tools(tools))
    except _BadChatError as error:
        raise BadRecordError(f"{record.place}: {error}") from None


def _values(record: Record, key: str) -> tuple[object, object]:
    """What lies under `key` and `TOOLS_KEY`."""
    if record.columns is None:
        line = parse_object(record)
        return value_of_key(record, line, key), line.get(TOOLS_KEY)
    messages, tools = (
        _of_json(name, text) for name, text in zip((key, TOOLS_KEY), record.columns, strict=True)
    )
    return messages, tools


def _of_json(name: str, text: str | bytes | None) -> object:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadChatError(f"{name!r} is not valid JSON ({error}).") from None


def _messages(value: object, key: str) -> Messages:
    if not isinstance(value, list):
        raise _BadChatError(f"{key!r} is not a list of messages but {type(value).__name__}.")
    if not value:
        raise _BadChatError(f"{key!r} is an empty list; a conversation has messages.")
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, value: object) -> dict[str, Any]:
    """A message with role and content. Fields that are null are left out: Parquet has them everywhere."""
    if not isinstance(value, dict):
        raise _BadChatError(f"message {number} is not an object but {type(value).__name__}.")
    message = {name: part for name, part in value.items() if part is not None}
    if "role" not in message and "from" in message:
        message = _of_sharegpt(number, message)
    if "role" not in message:
        raise _BadChatError(
            f"message {number} has no 'role'; its keys are {', '.join(map(repr, value)) or 'none'}."
        )
    if message["role"] not in ROLES:
        raise _BadChatError(
            f"message {number} has the role {message['role']!r}; known are {', '.join(ROLES)}."
        )
    if "content" not in message and message.get("tool_calls"):
        message["content"] = ""
    if not isinstance(message.get("content"), str):
        kind = type(value.get("content")).__name__
        raise _BadChatError(f"'content' of message {number} is not a text but {kind}.")
    for name, text in texts_within(message):
        if (problem := lone_surrogate(text)) is not None:
            raise _BadChatError(f"{name!r} of message {number}: {problem}.")
    return message


def _of_sharegpt(number: int, message: dict[str, Any]) -> dict[str, Any]:
    role = _SHAREGPT_ROLES.get(str(message["from"]))
    if role is None:
        raise _BadChatError(
            f"message {number} is from {message['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}."
        )
    rest = {name: part for name, part in message.items() if name not in ("from", "value")}
    return {"role": role, "content": message.get("value"), **rest}


def _tools(value: object) -> Sequence[Any] | None:
    """Some collections keep tools as JSON text."""
    tools = _of_json(TOOLS_KEY, value) if isinstance(value, str) else value
    if tools is not None and not isinstance(tools, list):
        raise _BadChatError(f"{TOOLS_KEY!r} is not a list but {type(tools).__name__}.")
    return tools or None


def texts_within(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All texts of a message, however deep, each with the name of the field that it lies in."""
    for name, value in message.items():
        pending = [value]
        while pending:
            part = pending.pop()
            if isinstance(part, str):
                yield name, part
            elif isinstance(part, Mapping):
                pending += [*part, *part.values()]
            elif isinstance(part, list):
                pending += part
