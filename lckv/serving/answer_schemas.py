"""What answers hold, as JSON schemas for `/openapi.json`. `answers.py` is what makes them."""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_NULL: Schema = {"type": "null"}


def _object(**properties: Schema) -> Schema:
    """All of them are always there, and nothing else."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)

_FINISH_REASON = _or_null({"enum": ["stop", "length", "error"]})

_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _or_null(_list(_INTEGER))}

_CHAT_LOGPROBS = _or_null(_object(content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN))))))

_COMPLETION_LOGPROBS = _or_null(
    _object(
        tokens=_list(_TEXT),
        token_logprobs=_list(_or_null(_NUMBER)),
        top_logprobs=_list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
        text_offset=_list(_INTEGER),
    )
)

_MESSAGE = _object(role={"enum": ["assistant"]}, content=_TEXT, refusal=_NULL)

_DELTA: Schema = {
    "type": "object",
    "properties": {"role": {"enum": ["assistant"]}, "content": _TEXT},
    "additionalProperties": False,
}


def _choice(logprobs: Schema, **content: Schema) -> Schema:
    return _object(index=_INTEGER, **content, logprobs=logprobs, finish_reason=_FINISH_REASON)


def _answer(kind: str, choice: Schema, **more: Schema) -> Schema:
    return _object(
        id=_TEXT, object={"enum": [kind]}, created=_INTEGER, model=_TEXT, choices=_list(choice), **more
    )


def _piece(kind: str, choice: Schema) -> Schema:
    """One event of a stream; the numbers of tokens come with the last one, where they are wanted."""
    made = _answer(kind, choice)
    return {**made, "properties": {**made["properties"], "usage": _or_null(USAGE)}}


COMPLETION = _answer("text_completion", _choice(_COMPLETION_LOGPROBS, text=_TEXT), usage=USAGE)
COMPLETION_PIECE = _piece("text_completion", _choice(_COMPLETION_LOGPROBS, text=_TEXT))
CHAT = _answer("chat.completion", _choice(_CHAT_LOGPROBS, message=_MESSAGE), usage=USAGE)
CHAT_PIECE = _piece("chat.completion.chunk", _choice(_CHAT_LOGPROBS, delta=_DELTA))

MODEL = _object(
    id=_TEXT, object={"enum": ["model"]}, created=_INTEGER, owned_by=_TEXT, max_model_len=_INTEGER
)
MODELS = _object(object={"enum": ["list"]}, data=_list(MODEL))
HEALTH = _object(status={"enum": ["ok", "failed"]})
ERROR = _object(
    error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT), request_id=_TEXT)
)
