"""Around the routes: decisions on what was sent byte for byte, ids, errors in one form whatever failed."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from lckv.serving.worker import Answer, EngineWorker
from tests.lckv.serving.served_model import make_app, make_engine

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 2}
JSON = (b"content-type", b"application/json")
CHUNKED = (b"transfer-encoding", b"Chunked")


class Asker:
    """Hands requests to an application as a server does, as bytes."""

    def __init__(self, app: FastAPI, runner: asyncio.Runner) -> None:
        self._app, self._runner = app, runner

    def ask(
        self, path: bytes, *headers: tuple[bytes, bytes], method: str = "GET", body: bytes = b""
    ) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and content of the answer."""
        sent: list[dict[str, Any]] = []
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return received.pop() if received else await asyncio.sleep(3600, {})

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "raw_path": path,
            "path": path.decode(),
            "query_string": b"",
        }
        scope |= {"headers": list(headers), "http_version": "1.1", "scheme": "http", "server": ("x", 80)}
        self._runner.run(self._app({**scope, "client": ("y", 1), "root_path": ""}, receive, send))
        content = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], dict(sent[0]["headers"]), content

    def post(self, **fields: Any) -> tuple[int, dict[bytes, bytes], bytes]:
        """A request for a completion."""
        body = json.dumps({**BODY, **fields}).encode()
        length = (b"content-length", str(len(body)).encode())
        return self.ask(b"/v1/completions", KEY, JSON, length, method="POST", body=body)


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    app = make_app(make_engine(), api_key="se¢ret")
    with asyncio.Runner() as runner:
        lifespan = app.router.lifespan_context(app)
        runner.run(lifespan.__aenter__())
        yield Asker(app, runner)
        runner.run(lifespan.__aexit__(None, None, None))


KEY = (b"authorization", "Bearer se¢ret".encode())


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((b"host", b"x/health?"),),  # once the path was read from an address that the host was part of
        ((b"host", b"x/health#"), (b"x-forwarded-for", b"127.0.0.1")),
        ((b"authorization", b"Bearer wrong"),),
        ((b"authorization", "se¢ret".encode()),),
        ((b"authorization", "Basic se¢ret".encode()),),
        ((b"authorization", b"Bearer wrong"), KEY),
        (KEY, KEY),
        ((b"authorization", b"Bearer "),),
    ],
)
@pytest.mark.parametrize(
    "path", [b"/v1/models", b"/V1/models", b"//v1/models", b"/health/", b"/health%20", b"/x"]
)
def test_without_the_key_nothing_is_shown(asker: Asker, path: bytes, headers: tuple) -> None:
    status, answered, content = asker.ask(path, *headers)
    assert status == 401 and answered[b"www-authenticate"] == b"Bearer"
    assert json.loads(content)["error"]["type"] == "authentication_error"


def test_with_the_key_everything_is(asker: Asker) -> None:
    assert asker.ask(b"/v1/models", KEY)[0] == 200
    assert asker.ask(b"/v1/models", (b"authorization", "bearer se¢ret".encode()))[0] == 200
    for path in (b"/health", b"/metrics", b"/docs", b"/openapi.json"):
        for method in ("GET", "HEAD"):
            assert asker.ask(path, method=method)[0] == 200
    assert asker.ask(b"/v1/models", method="HEAD")[0] == asker.ask(b"/x", method="OPTIONS")[0] == 401


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", b"/nothing", (), 404),
        ("GET", b"/v1/models/", (), 404),
        ("GET", b"/v1/completions", (), 405),
        ("POST", b"/v1/completions", (JSON,), 411),
        ("POST", b"/v1/completions", (JSON, (b"content-length", "²".encode("latin-1"))), 411),
        ("POST", b"/v1/completions", (JSON, (b"content-length", b"1"), (b"content-length", b"2")), 411),
        ("POST", b"/v1/completions", (JSON, (b"content-length", b"9" * 12)), 413),
        ("POST", b"/v1/completions", (JSON, CHUNKED, (b"content-length", b"2")), 400),
        ("POST", b"/v1/completions", (JSON, CHUNKED, CHUNKED), 400),
        ("POST", b"/v1/completions", (JSON, (b"transfer-encoding", b"gzip, chunked")), 400),
        ("POST", b"/v1/completions", (CHUNKED,), 415),
        ("POST", b"/v1/completions", (JSON, CHUNKED), 400),  # no JSON
        ("POST", b"/v1/completions", ((b"content-length", b"2"),), 415),
        ("POST", b"/v1/completions", ((b"content-type", b"text/plain"), (b"content-length", b"2")), 415),
    ],
)
def test_all_errors_have_one_form_and_an_id(
    asker: Asker, method: str, path: bytes, headers: tuple, status: int
) -> None:
    answered_status, answered, content = asker.ask(path, KEY, *headers, method=method)
    assert answered_status == status
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert answered[b"x-request-id"] == error["request_id"].encode()
    assert answered[b"content-type"] == b"application/json"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fault of the server's own."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(EngineWorker, "submit", fail)
        yield


@pytest.mark.usefixtures("failing")
def test_an_unexpected_failure_is_an_error_like_others(
    asker: Asker, caplog: pytest.LogCaptureFixture
) -> None:
    status, answered, content = asker.post()
    error = json.loads(content)["error"]
    assert (status, error["type"]) == (500, "server_error")
    assert "secret" not in error["message"]
    request_id = answered[b"x-request-id"].decode()
    assert error["request_id"] == request_id and f"request {request_id} failed" in caplog.text
    assert "ZeroDivisionError: secret" in caplog.text


def test_an_unexpected_failure_in_a_stream_is_an_event(
    asker: Asker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Answer) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Answer, "__aiter__", fail)
    status, answered, content = asker.post(stream=True)
    assert status == 200
    (event,) = [line for line in content.decode().split("\n\n") if line]
    error = json.loads(event.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and error["request_id"] == answered[b"x-request-id"].decode()
    assert "ZeroDivisionError: secret" in caplog.text


def test_an_engine_without_a_tokenizer_cannot_be_served() -> None:
    engine = make_engine()
    engine.texts = None
    with pytest.raises(ValueError, match="a server answers with texts; give the engine a tokenizer"):
        make_app(engine)
