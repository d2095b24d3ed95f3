"""The description of the interface is true: of every field that is read, its values, and every answer."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lckv.serving import protocol
from lckv.serving.errors import ApiError
from lckv.serving.fields import Fields
from lckv.serving.openapi import document
from tests.lckv.serving.served_model import LIMITS, ask

DOCUMENT = document(LIMITS)
SCHEMAS: Mapping[str, dict[str, Any]] = DOCUMENT["components"]["schemas"]
LEAST: dict[str, dict[str, Any]] = {
    "CompletionRequest": {"prompt": "x"},
    "ChatRequest": {"messages": [{"role": "user", "content": "x"}]},
}

NEEDED = {
    ("ChatRequest", "top_logprobs"): {"logprobs": True},
    ("CompletionRequest", "max_tokens"): {"echo": True},
}
"""What some values need beside them."""


def read(name: str, **fields: Any) -> Any:
    """A request as the server understands it."""
    reader = protocol.completion_request if name == "CompletionRequest" else protocol.chat_request
    return reader({**LEAST[name], **fields}, "tiny", LIMITS)


def properties() -> Iterator[tuple[str, str]]:
    for name in LEAST:
        for field in SCHEMAS[name]["properties"]:
            yield name, field


def refused(name: str, field: str, value: Any, **others: Any) -> bool:
    """By its name."""
    try:
        read(name, **{field: value}, **others)
    except ApiError as error:
        return field in error.message
    return False


@pytest.mark.parametrize("name", LEAST)
def test_the_fields_are_those_that_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[str] = set()
    take, refuse_others = Fields.take, Fields.refuse_others

    def taking(self: Fields, field: str, *arguments: Any) -> Any:
        known.update([field] if self.path("") == "" else [])
        return take(self, field, *arguments)

    def refusing(self: Fields, accepted: Mapping[str, Any]) -> None:
        known.update(accepted if self.path("") == "" else [])
        refuse_others(self, accepted)

    monkeypatch.setattr(Fields, "take", taking)
    monkeypatch.setattr(Fields, "refuse_others", refusing)
    read(name)
    assert set(SCHEMAS[name]["properties"]) == known


@pytest.mark.parametrize(("name", "field"), list(properties()))
def test_what_is_said_of_a_field_is_so(name: str, field: str) -> None:
    schema = SCHEMAS[name]["properties"][field]
    assert refused(name, field, {"wrong": 1}) or field in ("logit_bias", "chat_template_kwargs")
    if "default" in schema:
        assert read(name, **{field: schema["default"]}) == read(name)
    for value in schema.get("enum", ()):
        assert not refused(name, field, value)
    if "enum" in schema:
        assert all(refused(name, field, value) for value in ("?", 7, [7]))
    for part in schema.get("anyOf", ()):
        check_bounds(name, field, part)


def check_bounds(name: str, field: str, part: Mapping[str, Any]) -> None:
    step = 1 if part.get("type") == "integer" else 0.001
    for bound, sign in (("minimum", -1), ("maximum", 1)):
        if bound in part:
            assert not refused(name, field, part[bound], **NEEDED.get((name, field), {}))
            # Of a large number, what the next one differs by is more than the step.
            outside = part[bound] + sign * (step if step == 1 else max(step, abs(part[bound]) / 1000))
            assert refused(name, field, outside)
    if "exclusiveMinimum" in part:
        assert refused(name, field, part["exclusiveMinimum"])
        assert not refused(name, field, part["exclusiveMinimum"] + step)
    if part.get("type") == "integer":
        assert refused(name, field, 1.5)
    if part.get("type") == "boolean":
        assert refused(name, field, 1)


def wrong(value: Any, schema: Mapping[str, Any], path: str = "") -> list[str]:
    """Where a value is not as its schema says."""
    schema = SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "anyOf" in schema:
        tried = [wrong(value, part, path) for part in schema["anyOf"]]
        return [] if [] in tried else tried[0]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{path} is {value!r}"]
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": float,
        "null": type(None),
    }
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{path} is {value!r}"]
    if schema["type"] == "array":
        return [found for entry in value for found in wrong(entry, schema["items"], f"{path}[]")]
    if schema["type"] != "object":
        return []
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    found = [f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value]
    for name, member in value.items():
        if name not in known and not others:
            found.append(f"{path}.{name} is not described")
        else:
            found += wrong(member, known.get(name, others), f"{path}.{name}")
    return found


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("completions", {}),
        ("completions", {"logprobs": 2, "stream_options": {"include_usage": True}}),
        ("completions", {"logprobs": 2, "echo": True, "n": 2}),
        ("chat/completions", {"logprobs": True, "top_logprobs": 2, "stop": "e"}),
        ("chat/completions", {"stream_options": {"include_usage": True}}),
        ("completions", {"prompt": 7}),
    ],
)
def test_answers_are_as_described(client: TestClient, path: str, fields: dict[str, Any]) -> None:
    content = DOCUMENT["paths"][f"/v1/{path}"]["post"]["responses"]
    whole = ask(client, path, **{**fields, "stream_options": ...})
    described = content["200" if whole.status_code == 200 else "4XX"]["content"]
    assert wrong(whole.json(), described["application/json"]["schema"]) == []
    if whole.status_code == 200:
        lines = ask(client, path, **fields, stream=True).text.split("\n\n")[:-2]
        for line in lines:
            piece = json.loads(line.removeprefix("data: "))
            assert wrong(piece, described["text/event-stream"]["schema"]) == []


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{model}", "/health"])
def test_what_can_be_got_is_as_described(client: TestClient, path: str) -> None:
    schema = DOCUMENT["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert wrong(client.get(path.format(model="tiny")).json(), schema) == []


def test_all_paths_are_described(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert described == DOCUMENT and described["openapi"].startswith("3.1")
    routes = {route.path.replace(":path", "") for route in client.app.routes}  # type: ignore[attr-defined]
    assert set(described["paths"]) == routes - {"/docs", "/openapi.json"}


def test_references_lead_somewhere() -> None:
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert names == set(SCHEMAS)


def test_the_page_has_every_field_and_loads_nothing(client: TestClient) -> None:
    answer = client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert all(f"<code>{field}</code>" in answer.text for _, field in properties())
    assert not re.search(r"<script|<link|<img|src=|https?://", answer.text)
