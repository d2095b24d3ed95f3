"""The body of a request: read in bounded time and memory, and parsed as JSON that means one thing only."""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from lckv.serving.errors import ApiError, shown
from lckv.serving.limits import ServingLimits
from lckv.surrogates import lone_surrogate

_DEEPEST = 32
"""Lists and objects in one another."""

_INTEGER_BITS = 64


async def read_body(request: Request, limits: ServingLimits) -> bytes:
    """All of it. Raises ApiError where it is too long or takes too long."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limits.max_body_bytes:
                    most = limits.max_body_bytes
                    raise ApiError(413, f"The body may have at most {most} bytes.", close=True)
    except TimeoutError:
        raise ApiError(
            408, f"The body was not there after {limits.body_seconds:g} seconds.", close=True
        ) from None
    except ClientDisconnect:
        raise ApiError(499, "The client has closed the connection.") from None
    return b"".join(parts)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object of Unicode texts and of numbers of 64 bits, no field twice, not too deep. Raises ApiError
    for anything else, with the field's name where there is one."""
    try:
        content = json.loads(body.decode("utf-8"), object_pairs_hook=_each_once)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8: byte {error.start}.") from error
    except RecursionError:
        raise ApiError(400, f"The body is nested more than {_DEEPEST} deep.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ApiError(400, f"The body is {shown(content)}; it must be a JSON object.")
    _check_values(content)
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ApiError(400, f"The body has the field {shown(twice)} twice.")
    return content


def _check_values(content: dict[str, Any]) -> None:
    """Without recursion, which the client could exhaust."""
    left: list[tuple[str, Any, int]] = [("", content, 1)]
    while left:
        path, value, depth = left.pop()
        if depth > _DEEPEST:
            raise ApiError(400, f"The body is nested more than {_DEEPEST} deep.")
        for name, member in _members(value):
            if isinstance(name, str) and (problem := lone_surrogate(name)) is not None:
                raise ApiError(400, f"The name of the field {shown(_path(path, name))}: {problem}.")
            if isinstance(member, dict | list):
                left.append((_path(path, name), member, depth + 1))
            elif not _plain(member):
                _check_value(_path(path, name), member)


def _members(value: Any) -> Iterator[tuple[str | int, Any]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)


def _path(path: str, name: str | int) -> str:
    if isinstance(name, int):
        return f"{path}[{name}]"
    return f"{path}.{name}" if path else name


def _plain(value: Any) -> bool:
    """Most of what there is, decided fast."""
    return value is None or (value.isascii() if isinstance(value, str) else -1e9 < value < 1e9)


def _check_value(path: str, value: Any) -> None:
    problem: str | None = None
    if isinstance(value, str):
        problem = lone_surrogate(value)
    elif isinstance(value, int):
        problem = "an integer must fit into 64 bits" if value.bit_length() >= _INTEGER_BITS else None
    elif not math.isfinite(value):
        problem = f"{value} is no finite number"
    if problem is not None:
        raise ApiError(400, f"{path}: {problem}.", param=path)
