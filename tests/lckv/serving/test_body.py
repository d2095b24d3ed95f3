"""JSON that means one thing only, and what is said of any other."""

import json
from typing import Any

import pytest

from lckv.serving.body import parse_object
from lckv.serving.errors import ApiError

HALF = "\ud800"


def test_what_is_in_order_is_taken() -> None:
    content: dict[str, Any] = {"é": ["😀", 1.5, -3, None, True, {"a": []}], "seed": 2**63 - 1}
    assert parse_object(json.dumps(content).encode()) == content
    assert parse_object(json.dumps(content, ensure_ascii=False).encode()) == content


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "\xff"}', "The body is not UTF-8: byte 12"),
        ('{"a": 1}'.encode("utf-16"), "The body is not UTF-8: byte 0"),
        (b'{"prompt": ', "The body is not valid JSON: Expecting value"),
        (b"", "The body is not valid JSON"),
        (b"[1]", "The body is [1]; it must be a JSON object"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "The body has the field 'c' twice"),
        (b'{"a": ' + b"[" * 100_000, "The body is nested more than 32 deep"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "The body is nested more than 32 deep"),
        (b'{"temperature": NaN}', "temperature: nan is no finite number"),
        (b'{"temperature": -Infinity}', "temperature: -inf is no finite number"),
        (b'{"temperature": 1e999}', "temperature: inf is no finite number"),
        (b'{"seed": 9223372036854775808}', "seed: an integer must fit into 64 bits"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "The body is not valid JSON: Exceeds the limit"),
        (b'{"a": [[1, {"b": 1e999}]]}', "a[0][1].b: inf is no finite number"),
    ],
)
def test_anything_else_is_an_error_by_name(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(body)
    assert caught.value.status == 400
    assert message in caught.value.message


FIELDS = {
    "prompt": {"prompt": f"a{HALF}"},
    "prompt[1]": {"prompt": ["a", HALF]},
    "messages[0].content": {"messages": [{"role": "user", "content": HALF}]},
    "messages[0].content[0].text": {"messages": [{"role": "user", "content": [{"text": HALF}]}]},
    "messages[1].name": {"messages": [{}, {"name": HALF}]},
    "stop[0]": {"stop": [HALF]},
    "tools[0].function.description": {"tools": [{"function": {"description": HALF}}]},
    "chat_template_kwargs.x": {"chat_template_kwargs": {"x": HALF}},
    "user": {"user": HALF},
    "model": {"model": HALF},
}


@pytest.mark.parametrize("path", FIELDS)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(path: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(json.dumps(FIELDS[path]).encode())
    assert caught.value.param == path
    assert caught.value.message.startswith(f"{path}: character ")
    assert "is U+D800, half of a surrogate pair, which is no character" in caught.value.message


def test_half_a_surrogate_pair_in_a_name_is_shown_escaped() -> None:
    with pytest.raises(ApiError, match=r"The name of the field 'a\[0\]\.x\\ud800': character 1 is U\+D800"):
        parse_object(json.dumps({"a": [{f"x{HALF}": [HALF]}]}).encode())
