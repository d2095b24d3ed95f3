"""OpenAI's library, unmodified: structured answers as objects of its user, and calls of tools."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.lckv.serving.served_model import TOOL_TEMPLATE, write_folder
from tests.lckv_megatron.commands.test_serve import Server

USER: Any = {"role": "user", "content": "Hi"}
ASK: Any = {"model": "tiny", "messages": [USER], "max_tokens": 300, "seed": 2}


class Place(BaseModel):
    city: Literal["Rome", "Oslo"]
    sunny: bool


class Look(BaseModel):
    """Look at a place."""

    place: Place


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    server = Server(write_folder(folder, context=2048, chat_template=TOOL_TEMPLATE))
    yield server.client
    assert server.end() == 0, server.log


def test_answers_are_objects_of_a_class(client: openai.OpenAI) -> None:
    message = client.chat.completions.parse(**ASK, response_format=Look).choices[0].message
    assert isinstance(message.parsed, Look)
    assert Look.model_validate_json(message.content or "") == message.parsed
    turns = [USER, message, USER]
    assert client.chat.completions.create(**{**ASK, "messages": turns, "max_tokens": 3}).choices


def test_structured_answers_are_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASK, response_format=Place) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert isinstance(final.message.parsed, Place) and final.finish_reason == "stop"
    assert "".join(deltas) == final.message.content


def test_a_schema_that_cannot_be_followed_is_said(client: openai.OpenAI) -> None:
    described: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys") as caught:
        client.chat.completions.create(**ASK, response_format=described)
    assert caught.value.param == "response_format"


def test_a_tool_is_called_and_its_result_is_taken(client: openai.OpenAI) -> None:
    fields = {**ASK, "tools": [openai.pydantic_function_tool(Look)], "parallel_tool_calls": False}
    choice = client.chat.completions.parse(**fields, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "Look" and isinstance(call.function.parsed_arguments, Look)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    turns = [USER, choice.message, result]
    named = {"type": "function", "function": {"name": "Look"}}
    second = client.chat.completions.create(**{**fields, "messages": turns, "tool_choice": named})
    assert json.loads(second.choices[0].message.tool_calls[0].function.arguments)["place"]["city"]
    answer = client.chat.completions.create(**{**ASK, "messages": turns, "max_tokens": 5})
    assert answer.usage.completion_tokens > 0


def test_calls_are_streamed(client: openai.OpenAI) -> None:
    fields = {**ASK, "tools": [openai.pydantic_function_tool(Look)], "parallel_tool_calls": False}
    with client.chat.completions.stream(**fields, tool_choice="required") as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert [event.name for event in done] == ["Look"]
    assert isinstance(final.message.tool_calls[0].function.parsed_arguments, Look)
