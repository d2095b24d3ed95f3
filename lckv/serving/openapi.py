"""The description of the server's interface: `/openapi.json`, and a page made of it that loads nothing."""

from collections.abc import Iterator, Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from json import dumps
from typing import Any

from lckv.serving import answer_schemas as answers
from lckv.serving.limits import ServingLimits
from lckv.serving.request_schemas import chat_schema, completion_schema

Schema = dict[str, Any]


def document(limits: ServingLimits) -> Schema:
    """OpenAPI 3.1."""
    schemas = {
        "CompletionRequest": completion_schema(limits),
        "Completion": answers.COMPLETION,
        "CompletionPiece": answers.COMPLETION_PIECE,
        "ChatRequest": chat_schema(limits),
        "Chat": answers.CHAT,
        "ChatPiece": answers.CHAT_PIECE,
        "Models": answers.MODELS,
        "Model": answers.MODEL,
        "Health": answers.HEALTH,
        "Error": answers.ERROR,
    }
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "LCKV-Megatron", "version": _version()},
        "paths": {
            "/v1/completions": {"post": _post("Continue texts", "Completion")},
            "/v1/chat/completions": {"post": _post("Answer a chat", "Chat")},
            "/v1/models": {"get": _get("The model that is served", _json("Models"))},
            "/v1/models/{model}": {
                "get": {**_get("A model by its name", _json("Model")), "parameters": [name]}
            },
            "/health": {"get": _get("Whether requests are answered", _json("Health"), key=False)},
            "/metrics": {"get": _get("Numbers for Prometheus", {"text/plain": {}}, key=False)},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(described: Mapping[str, Any]) -> str:
    """`document` for people, as HTML."""
    schemas: Mapping[str, Schema] = described["components"]["schemas"]
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{described['info']['title']}</title>",
    ]
    lines += ["<style>body{font:1em sans-serif;max-width:60em;margin:2em auto}td{vertical-align:top;"]
    lines += ["padding:.2em 1em .2em 0}code{white-space:pre-wrap}</style>"]
    lines += [f"<h1>{described['info']['title']}</h1><p>The same for programs: <a href=/openapi.json>"]
    lines += ["openapi.json</a>.</p><h2>Paths</h2><table>"]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            lines.append(f"<tr><td><code>{method.upper()} {path}</code><td>{escape(operation['summary'])}")
    lines.append("</table>")
    for name, schema in schemas.items():
        lines += [f"<h2 id={name}>{name}</h2><table>", *_rows(schema), "</table>"]
    return "\n".join(lines)


def _rows(schema: Schema) -> Iterator[str]:
    for name, field in schema["properties"].items():
        required = " (required)" if name in schema.get("required", ()) else ""
        described = {key: value for key, value in field.items() if key != "description"}
        text = escape(field.get("description", ""))
        shape = escape(dumps(described, ensure_ascii=False), quote=False)
        yield f"<tr><td><code>{name}</code>{required}<td>{text} <code>{shape}</code>"


def _post(summary: str, name: str) -> Schema:
    content = {**_json(name), "text/event-stream": {"schema": _reference(f"{name}Piece")}}
    body = {"required": True, "content": _json(f"{name}Request")}
    return {**_get(summary, content), "requestBody": body}


def _get(summary: str, content: Schema, *, key: bool = True) -> Schema:
    """`key`: whether it is asked for with a key, where the server has one."""
    error = {"description": "What went wrong", "content": _json("Error")}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "OK", "content": content}},
    }
    if key:
        operation |= {"security": [{"key": []}, {}]}
        operation["responses"] |= {"4XX": error, "5XX": error}
    return operation


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _reference(name)}}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _version() -> str:
    try:
        return version("lckv-megatron")
    except PackageNotFoundError:  # a checkout
        return "unknown"
