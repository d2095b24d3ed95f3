"""The messages of a chat, as clients send them. Whatever the server itself sends as one is accepted."""

from typing import Any

from lckv.serving.errors import ApiError, shown
from lckv.serving.fields import LIST, TEXT, Fields, check
from lckv.serving.limits import ServingLimits
from lckv.serving.sizes import check_characters, check_count

ROLES = ("system", "developer", "user", "assistant")

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "name": ("",),
    "refusal": ("",),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
}
"""Fields of which only these values (and null) are supported."""


def conversation(messages: list[Any], limits: ServingLimits) -> list[dict[str, str]]:
    """The messages of a chat as roles and texts. Raises ApiError."""
    check_count(len(messages), limits.max_messages, "messages", "messages")
    turns = [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    check_characters(sum(len(turn["content"]) for turn in turns), "messages", limits)
    return turns


def _message(given: Any, path: str) -> dict[str, str]:
    fields = Fields(given, path)
    role = fields.need("role", TEXT)
    if role not in ROLES:
        where = fields.path("role")
        raise ApiError(400, f"{where} is {shown(role)}; it must be one of {', '.join(ROLES)}.", param=where)
    content = fields.take("content")
    if content is None and role != "assistant":  # those of assistants may be empty beside other fields
        where = fields.path("content")
        raise ApiError(400, f"{where} is missing; it must be a text, or a list of parts.", param=where)
    fields.refuse_others(_ACCEPTED)
    return {"role": role, "content": _content(content, fields.path("content"))}


def _content(content: Any, path: str) -> str:
    """A message's text, from its parts: [{"type": "text", "text": ...}, ...]."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = check(content, LIST._replace(words="a text, or a list of parts"), path)
    return "".join(_part(part, f"{path}[{place}]") for place, part in enumerate(parts))


def _part(given: Any, path: str) -> str:
    fields = Fields(given, path)
    kind = fields.need("type", TEXT)
    if kind != "text":
        where = fields.path("type")
        raise ApiError(400, f"{where} is {shown(kind)}; only 'text' is supported.", param=where)
    text = fields.need("text", TEXT)
    fields.refuse_others({})
    return str(text)
