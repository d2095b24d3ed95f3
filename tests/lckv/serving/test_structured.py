"""Structured answers and calls of tools over HTTP: what is asked for is given, whole and streamed; what is
wrong with a request is said under the name of its field."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lckv.generation import grammars
from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.serving.app import create_app
from lckv.serving.limits import ServingLimits
from tests.lckv.serving.served_model import LIMITS, TOOL_TEMPLATE, ask, byte_tokenizer, tiny_model
from tests.lckv.serving.test_openapi import wrong

LARGE = ServingLimits(context=1024, max_prompt_tokens=800, max_new_tokens=200, max_schema_characters=2000)
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
SCHEMA = {**CITY, "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": CITY, "strict": True},
}
STOP = {"type": "function", "function": {"name": "stop"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
LONG = {"temperature": 1.0, "seed": 3, "max_tokens": 200}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    config = EngineConfig(memory_bytes=2**22, max_batch_size=4)
    engine = Engine(tiny_model(context=1024), config, tokenizer=tokenizer)
    with TestClient(create_app(engine, tokenizer, model="tiny", limits=LARGE, api_key=None)) as client:
        yield client


def chat(client: TestClient, **fields: Any) -> Any:
    response = ask(client, "chat/completions", **{**LONG, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def pieces(client: TestClient, **fields: Any) -> list[Any]:
    lines = ask(client, "chat/completions", **{**LONG, **fields}, stream=True).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]


def refusal(client: TestClient, path: str = "chat/completions", **fields: Any) -> tuple[str, str]:
    response = ask(client, path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("seed", [1, 2])
def test_chats_are_held_to_a_schema(client: TestClient, seed: int) -> None:
    choice = chat(client, response_format=FORMAT, seed=seed)
    assert json.loads(choice["message"]["content"])["city"] in ("Rome", "Oslo")
    assert choice["finish_reason"] == "stop"
    streamed = pieces(client, response_format=FORMAT, seed=seed)
    assert "".join(piece["delta"]["content"] for piece in streamed) == choice["message"]["content"]
    assert streamed[-1]["finish_reason"] == "stop"


def test_completions_are_held_to_a_schema(client: TestClient) -> None:
    choices = ask(client, **LONG, prompt=["a", "b"], n=2, response_format=FORMAT).json()["choices"]
    assert len(choices) == 4
    assert all(set(json.loads(choice["text"])) == {"city"} for choice in choices)


def test_any_object_and_any_text(client: TestClient) -> None:
    choice = chat(client, response_format={"type": "json_object"}, seed=5)
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    free = chat(client, response_format={"type": "text"}, max_tokens=9)
    assert free == chat(client, max_tokens=9)


def test_an_answer_that_is_cut_off_says_so(client: TestClient) -> None:
    choice = chat(client, response_format=FORMAT, max_tokens=2)
    assert choice["finish_reason"] == "length" and len(choice["message"]["content"]) == 2


@pytest.mark.parametrize(
    ("wanted", "param", "message"),
    [
        (
            {"type": "xml"},
            "response_format",
            "response_format.type is 'xml'; it must be one of text, json_object,",
        ),
        (
            {"type": "json_schema"},
            "response_format.json_schema",
            "json_schema is missing; it must be an object",
        ),
        ({"type": "text", "json_schema": {}}, "response_format.json_schema", "there is no such field"),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            "response_format.json_schema.schema",
            "schema is missing; it must be an object",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
            "response_format",
            "response_format: failed to compile JSON schema: Invalid type: nothing.",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}},
            "response_format",
            "Unimplemented keys",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"description": "x" * 2000}}},
            "response_format.json_schema.schema",
            "characters as JSON; 0 to 2000 are allowed",
        ),
    ],
)
def test_wrong_formats(client: TestClient, wanted: dict[str, Any], param: str, message: str) -> None:
    for path in ("completions", "chat/completions"):
        said = refusal(client, path, response_format=wanted)
        assert said[0] == param and message in said[1]


def test_a_grammar_that_takes_hours_stops_nobody_else(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "TRIAL_SECONDS", 1.0)
    patterns = [
        {"type": "string", "pattern": f"[a-z]*{letter}[a-z]*"} for letter in "abcdefghijklmnopqrstuvwxyz"
    ]
    described = {"type": "json_schema", "json_schema": {"schema": {"allOf": patterns}}}
    param, message = refusal(client, response_format=described)
    assert param == "response_format"
    assert message == "response_format: it is too complex: it was not compiled after 1 seconds."
    assert chat(client, max_tokens=2)["finish_reason"] == "length"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_an_answer_that_must_be_a_call_is_one(client: TestClient, choice: Any) -> None:
    fields = {"tools": [WEATHER, STOP], "tool_choice": choice, "parallel_tool_calls": False}
    answer = chat(client, **fields)
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "weather":
        assert arguments["city"] in ("Rome", "Oslo") and len(arguments) == 1
    else:
        assert choice == "required" and call["function"]["name"] == "stop" and arguments == {}
    streamed = pieces(client, **fields)
    (delta,) = [piece["delta"]["tool_calls"] for piece in streamed if "tool_calls" in piece["delta"]]
    assert delta[0]["index"] == 0 and delta[0]["function"] == call["function"]
    assert "".join(piece["delta"].get("content", "") for piece in streamed) == ""
    assert streamed[-1]["finish_reason"] == "tool_calls"


def test_calls_are_as_described(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    fields = {**LONG, "tools": [STOP], "tool_choice": "required", "parallel_tool_calls": False}
    assert wrong(ask(client, "chat/completions", **fields).json(), schemas["Chat"]) == []
    lines = ask(client, "chat/completions", **fields, stream=True).text.split("\n\n")[:-2]
    assert any("tool_calls" in line for line in lines)
    for line in lines:
        assert wrong(json.loads(line.removeprefix("data: ")), schemas["ChatPiece"]) == []


def test_several_calls_in_one_answer(client: TestClient) -> None:
    counts = set()
    for seed in range(6):
        choice = chat(client, tools=[STOP], tool_choice="required", seed=seed, max_tokens=180)
        calls = choice["message"].get("tool_calls", [])
        counts.add(len(calls))
        assert all(call["function"] == {"name": "stop", "arguments": "{}"} for call in calls)
    assert max(counts) > 1


def test_a_call_that_is_cut_off_is_text(client: TestClient) -> None:
    choice = chat(client, tools=[STOP], tool_choice="required", max_tokens=15)
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == '<tool_call>\n{"n'


def test_tools_that_must_not_be_called_are_not_shown(client: TestClient) -> None:
    plain = ask(client, "chat/completions").json()
    hidden = ask(client, "chat/completions", tools=[WEATHER], tool_choice="none").json()
    assert hidden["usage"] == plain["usage"] and hidden["choices"] == plain["choices"]
    shown = ask(client, "chat/completions", tools=[WEATHER]).json()
    assert shown["usage"]["prompt_tokens"] > 100 + plain["usage"]["prompt_tokens"]
    assert "tool_calls" not in shown["choices"][0]["message"]


def test_calls_and_results_go_through_the_template(client: TestClient) -> None:
    arguments = {"city": "Rome"}
    call = {
        "id": "c1",
        "function": {"name": "weather", "arguments": json.dumps(arguments)},
        "type": "function",
    }
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{**call, "index": 0}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    written = json.dumps({"name": "weather", "arguments": arguments})
    text = f"<user>Hi<assistant><tool_call>{written}</tool_call><tool>rain<assistant>"
    asked = ask(client, "chat/completions", messages=turns).json()
    assert asked["choices"][0]["message"]["content"] == ask(client, prompt=text).json()["choices"][0]["text"]


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type is 'web'; only 'function' is supported"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name is 'a b'; it must be 1 to 64 of a-z"),
        ({"tools": [tool(), tool()]}, "tools: two functions have the same name"),
        ({"tools": [tool(parameters={"type": "array"})]}, "parameters.type is 'array'; it must be 'object'"),
        ({"tools": [tool(returns={})]}, "tools[0].function.returns: there is no such field"),
        ({"tools": [tool(description="x" * 2000)]}, "characters as JSON; 0 to 2000 are allowed"),
        ({"tools": [tool()] * 129}, "tools: 129 tools; 0 to 128 are allowed"),
        (
            {"tools": [tool()], "tool_choice": "any"},
            "tool_choice is 'any'; it must be one of none, auto, required",
        ),
        (
            {"tools": [tool()], "tool_choice": NAMED},
            "tool_choice.function.name is 'weather'; there is no tool",
        ),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "x"}}})], "tool_choice": "required"},
            "tools: failed to compile JSON schema: Invalid type: x",
        ),
        ({"tools": [tool()], "response_format": FORMAT}, "response_format beside tools: this server only"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id is missing"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments is '[1]'; it must be a JSON object",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments is not JSON",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "x", "function": {}}]}]},
            "messages[0].tool_calls[0].type is 'x'; only 'function' is supported",
        ),
    ],
)
def test_wrong_tools(client: TestClient, fields: dict[str, Any], message: str) -> None:
    param, said = refusal(client, **fields)
    assert message in said and param in said


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        ("{{ messages[0].content }}", {"tools": [STOP]}, "tools: the chat template of this model has none"),
        (
            "{{ tools }}",
            {"tools": [STOP]},
            "tools: the chat template of this model wants calls in a format that",
        ),
        (
            "{{ messages[0].content }}",
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]},
            "messages[0] is of calls of tools; the chat template of this model has none",
        ),
    ],
)
def test_templates_without_tools(template: str, fields: dict[str, Any], message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    engine = Engine(tiny_model(), EngineConfig(memory_bytes=2**20), tokenizer=tokenizer)
    limits = replace(LIMITS, max_schema_characters=1000)
    with TestClient(create_app(engine, tokenizer, model="tiny", limits=limits, api_key=None)) as client:
        assert message in refusal(client, **fields)[1]


def test_templates_may_be_several() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": TOOL_TEMPLATE}
    engine = Engine(tiny_model(context=1024), EngineConfig(memory_bytes=2**22), tokenizer=tokenizer)
    with TestClient(create_app(engine, tokenizer, model="tiny", limits=LARGE, api_key=None)) as client:
        choice = chat(client, tools=[STOP], tool_choice="required", parallel_tool_calls=False)
    assert choice["finish_reason"] == "tool_calls"
