"""Pages in a browser: those of allowed origins may ask and may read every answer, refusals too."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.lckv.serving.served_model import LIMITS, make_app, make_engine

ORIGIN = "https://chat.example.org"
KEY = {"Authorization": "Bearer secret"}
ALLOW = "access-control-allow-origin"


def serving(*origins: str) -> TestClient:
    return TestClient(make_app(make_engine(), replace(LIMITS, allowed_origins=origins), api_key="secret"))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving(ORIGIN) as client:
        yield client


def preflight(client: TestClient, origin: str) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    return client.options("/v1/chat/completions", headers=headers)


def test_a_browser_may_ask_without_the_key_whether_it_may_ask(client: TestClient) -> None:
    answer = preflight(client, ORIGIN)
    assert (answer.status_code, answer.headers[ALLOW]) == (200, ORIGIN)
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    assert "POST" in answer.headers["access-control-allow-methods"]


def test_pages_of_others_may_not(client: TestClient) -> None:
    answer = preflight(client, "https://other.example.org")
    assert answer.status_code == 400 and ALLOW not in answer.headers
    assert ALLOW not in client.get("/v1/models", headers={**KEY, "Origin": "http://chat.example.org"}).headers


def test_every_answer_can_be_read(client: TestClient) -> None:
    headers = {**KEY, "Origin": ORIGIN}
    post = "/v1/completions"
    for answer, status in (
        (client.get("/v1/models", headers=headers), 200),
        (client.post(post, json={"prompt": "x", "max_tokens": 2}, headers=headers), 200),
        (client.post(post, json={"prompt": "x", "max_tokens": 2, "stream": True}, headers=headers), 200),
        (client.get("/v1/models", headers={"Origin": ORIGIN}), 401),
        (client.get("/v1/nothing", headers=headers), 404),
        (client.post(post, json={"prompt": 7}, headers=headers), 400),
        (client.post(post, json={"prompt": "x" * 5000}, headers=headers), 413),
        (client.post(post, content=b"x", headers=headers), 415),
    ):
        assert (answer.status_code, answer.headers[ALLOW]) == (status, ORIGIN)
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "Origin"


def test_all_origins() -> None:
    with serving("*") as client:
        assert preflight(client, "null").headers[ALLOW] == "*"
        assert client.get("/v1/models", headers={"Origin": ORIGIN}).headers[ALLOW] == "*"


def test_none_unless_they_are_set() -> None:
    with serving() as client:
        assert preflight(client, ORIGIN).status_code == 401
        assert ALLOW not in client.get("/health", headers={"Origin": ORIGIN}).headers
