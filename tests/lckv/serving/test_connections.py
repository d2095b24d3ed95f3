"""Connections over real sockets: slow and idle ones end, too many are refused, others go on meanwhile."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import uvicorn

from lckv.serving.connections import server_config
from tests.lckv.serving.served_model import LIMITS, make_app, make_engine

SHORT = replace(
    LIMITS, idle_seconds=0.6, body_seconds=0.6, send_seconds=0.6, max_connections=4, shutdown_seconds=5
)
PATIENCE = 20
BODY = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Of a server in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(make_app(make_engine(), SHORT), SHORT))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield listening.getsockname()
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


@contextlib.contextmanager
def connected(address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        yield connection


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def rest(connection: socket.socket) -> bytes:
    """All until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def error_of(answer: bytes) -> tuple[int, dict]:
    start, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert f"x-request-id: {error['request_id']}".encode() in start
    return int(start.split()[1]), error


def asked(address: tuple[str, int]) -> int:
    """The status of a request that is as it should be."""
    with connected(address) as connection:
        connection.sendall(head(len(BODY), "Connection: close") + BODY)
        return int(rest(connection).split()[1])


def test_a_connection_that_sends_nothing_is_closed(address: tuple[str, int]) -> None:
    started = time.monotonic()
    with connected(address) as connection:
        assert rest(connection) == b""
    assert 0.4 < time.monotonic() - started < 10


def drip(connection: socket.socket, part: bytes) -> None:
    """Send byte for byte until the server has enough of it."""
    with contextlib.suppress(OSError):
        for _ in range(200):
            connection.sendall(part)
            time.sleep(0.05)
            connection.settimeout(0.001)
            try:
                if connection.recv(1, socket.MSG_PEEK) is not None:
                    break
            except TimeoutError:
                continue
            finally:
                connection.settimeout(PATIENCE)


def test_a_head_that_drips_is_ended(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        drip(connection, b"y")
        status, error = error_of(rest(connection))
    assert status == 408 and "The request's head was not there after 0.6 seconds" in error["message"]


def test_a_body_that_drips_is_ended_and_others_are_answered_meanwhile(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(head(1000))
        assert asked(address) == 200
        drip(connection, b" ")
        status, error = error_of(rest(connection))
    assert status == 408 and "The body was not there after 0.6 seconds" in error["message"]


CHUNKED = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


def test_a_body_in_chunks_is_answered(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        for part in (BODY[:7], BODY[7:]):
            connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            time.sleep(0.05)
        connection.sendall(b"0\r\n\r\n")
        assert rest(connection).split()[1] == b"200"


def test_chunks_have_the_limits_of_other_bodies(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(CHUNKED)
        drip(connection, b"1\r\n \r\n")
        status, error = error_of(rest(connection))
        assert status == 408 and "The body was not there after 0.6 seconds" in error["message"]
    with connected(address) as connection:
        connection.sendall(CHUNKED + b"1001\r\n" + b" " * 4097 + b"\r\n")
        status, error = error_of(rest(connection))
        assert status == 413 and "The body may have at most 4096 bytes" in error["message"]


def test_chunks_that_are_none_are_said_once(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(CHUNKED + b"2\r\n{\"\r\nzz\r\n")
        answer = rest(connection)
    assert error_of(answer)[0] == 400 and answer.count(b"HTTP/1.1") == 1


def test_a_head_is_answered_without_a_body(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        start, _, body = rest(connection).partition(b"\r\n\r\n")
    assert start.split()[1] == b"200" and body == b"" and b"content-length" in start.lower()


def test_a_body_that_was_refused_is_not_waited_for(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(head(10**9))
        assert error_of(rest(connection))[0] == 413


def test_a_connection_serves_several_requests_and_ends_when_idle(address: tuple[str, int]) -> None:
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=PATIENCE)) as connection:
        for _ in range(2):
            connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["usage"]["completion_tokens"]) == (200, 2)
        started = time.monotonic()
        assert rest(connection.sock) == b""
        assert 0.4 < time.monotonic() - started < 10


def test_connections_beyond_the_limit_are_refused(address: tuple[str, int]) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(SHORT.max_connections):
            stack.enter_context(connected(address))
        time.sleep(0.1)
        with connected(address) as connection:
            connection.sendall(head(len(BODY)) + BODY)
            status, error = error_of(rest(connection))
            assert status == 503 and "The server has 4 connections" in error["message"]
    deadline = time.monotonic() + PATIENCE
    while asked(address) != 200:
        assert time.monotonic() < deadline


def test_what_is_no_http_is_answered_as_json(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert error_of(rest(connection))[0] == 400


def _ask_without_end(connection: socket.socket) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")


def test_a_client_that_does_not_read_is_cut_off(address: tuple[str, int]) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(PATIENCE)
        connection.connect(address)
        # Answers that nobody reads, until the server's buffers are full.
        with pytest.raises(ConnectionError):
            _ask_without_end(connection)
    assert asked(address) == 200
