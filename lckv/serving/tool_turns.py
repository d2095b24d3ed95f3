"""Turns of a chat with calls of functions, and with their results."""

import json
from typing import Any

from lckv.serving.errors import ApiError, shown
from lckv.serving.fields import INTEGER, LIST, OBJECT, TEXT, Fields


def called(message: Fields) -> dict[str, Any]:
    """The calls of an assistant's message, as templates take them: arguments are objects. Raises ApiError."""
    message.take("parsed", OBJECT)  # OpenAI's library adds it to the messages that it has read
    calls = message.take("tool_calls", LIST, [])
    path = message.path("tool_calls")
    made = [_call(Fields(call, f"{path}[{place}]")) for place, call in enumerate(calls)]
    return {"tool_calls": made} if made else {}


def result_of(message: Fields) -> dict[str, Any]:
    """What a message of the role "tool" says beside its content. Raises ApiError."""
    said = {"tool_call_id": message.need("tool_call_id", TEXT), "name": message.take("name", TEXT)}
    return {name: value for name, value in said.items() if value is not None}


def has_tools(turn: dict[str, Any]) -> bool:
    """Whether a turn needs a template that knows of calls."""
    return turn["role"] == "tool" or "tool_calls" in turn


def _call(call: Fields) -> dict[str, Any]:
    call_id, kind = call.need("id", TEXT), call.take("type", TEXT, "function")
    call.take("index", INTEGER)  # of streamed calls that a client has put together
    if kind != "function":
        where = call.path("type")
        raise ApiError(400, f"{where} is {shown(kind)}; only 'function' is supported.", param=where)
    function = Fields(call.need("function", OBJECT), call.path("function"))
    call.refuse_others({})
    function.take("parsed_arguments", OBJECT)  # OpenAI's library adds them to the calls that it has read
    made = {"name": function.need("name", TEXT), "arguments": _arguments(function)}
    function.refuse_others({})
    return {"id": call_id, "type": "function", "function": made}


def _arguments(function: Fields) -> dict[str, Any]:
    given, where = function.need("arguments", TEXT), function.path("arguments")
    try:
        arguments = json.loads(given or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where} is not JSON: {error}.", param=where) from error
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{where} is {shown(given)}; it must be a JSON object.", param=where)
    return arguments
