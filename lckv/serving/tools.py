"""Functions that a request offers to the model (`tools`), and whether it must call one (`tool_choice`)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lckv.serving.errors import ApiError, shown
from lckv.serving.fields import BOOLEAN, LIST, OBJECT, TEXT, Fields, Kind
from lckv.serving.limits import ServingLimits
from lckv.serving.response_format import checked_schema
from lckv.serving.sizes import check_count

CHOICES = ("none", "auto", "required")
_CHOICE = Kind("none, auto, required or a function", lambda value: isinstance(value, str | dict))
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tools:
    """What the model is told that it may call."""

    described: Sequence[Mapping[str, Any]]
    """For the tokenizer's chat template."""

    parameters: Mapping[str, Mapping[str, Any]]
    """Of the functions that may be called, by their names: a JSON schema of the arguments."""

    required: bool
    """Whether the answer must be a call."""

    parallel: bool
    """Whether it may be several."""


def tools(fields: Fields, limits: ServingLimits) -> Tools | None:
    """None where there are none, or none may be called. Raises ApiError."""
    given = fields.take("tools", LIST, [])
    check_count(len(given), limits.max_tools, "tools", "tools", least=0)
    choice = fields.take("tool_choice", _CHOICE, "auto")
    parallel = fields.take("parallel_tool_calls", BOOLEAN, True)
    described = [_tool(tool, f"tools[{place}]", limits) for place, tool in enumerate(given)]
    checked_schema(described, "tools", limits)
    named = {tool["name"]: _arguments(tool) for tool in described}
    if len(named) < len(described):
        raise ApiError(400, "tools: two functions have the same name.", param="tools")
    required = choice == "required" or isinstance(choice, dict)
    callable_ = _chosen(choice, named)
    if not named or choice == "none":
        return None
    return Tools(
        [{"type": "function", "function": tool} for tool in described], callable_, required, parallel
    )


def _tool(given: Any, path: str, limits: ServingLimits) -> dict[str, Any]:
    function = _function(Fields(given, path))
    name = function.need("name", TEXT)
    where = function.path("name")
    if not _NAME.fullmatch(name):
        message = f"{where} is {shown(name)}; it must be 1 to 64 of a-z, A-Z, 0-9, '_', '-' and '.'."
        raise ApiError(400, message, param=where)
    description, parameters = function.take("description", TEXT), function.take("parameters", OBJECT)
    function.take("strict", BOOLEAN)
    function.refuse_others({})
    if parameters is not None and parameters.get("type", "object") != "object":
        where = f"{function.path('parameters')}.type"
        raise ApiError(400, f"{where} is {shown(parameters['type'])}; it must be 'object'.", param=where)
    optional = {"description": description, "parameters": parameters}
    return {"name": name, **{field: value for field, value in optional.items() if value is not None}}


def _function(tool: Fields) -> Fields:
    """Of a tool, and of a choice."""
    kind = tool.need("type", TEXT)
    if kind != "function":
        where = tool.path("type")
        raise ApiError(400, f"{where} is {shown(kind)}; only 'function' is supported.", param=where)
    function = Fields(tool.need("function", OBJECT), tool.path("function"))
    tool.refuse_others({})
    return function


def _arguments(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments that a function does not have are not made up."""
    return {"type": "object", "additionalProperties": False, **tool.get("parameters", _NO_ARGUMENTS)}


def _chosen(
    choice: str | dict[str, Any], named: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Mapping[str, Any]]:
    """The functions that may be called."""
    if isinstance(choice, str):
        if choice not in CHOICES:
            message = (
                f"tool_choice is {shown(choice)}; it must be one of {', '.join(CHOICES)}, or a function."
            )
            raise ApiError(400, message, param="tool_choice")
        if choice == "required" and not named:
            raise ApiError(400, "tool_choice is 'required', but there are no tools.", param="tool_choice")
        return named
    function = _function(Fields(choice, "tool_choice"))
    name = function.need("name", TEXT)
    function.refuse_others({})
    if name not in named:
        message = f"{function.path('name')} is {shown(name)}; there is no tool of that name."
        raise ApiError(400, message, param="tool_choice")
    return {name: named[name]}
