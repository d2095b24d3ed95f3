"""What clients send to the server, well and badly, and whether the answer is a proper one."""

import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lckv_megatron.faults.tally import Verdict

_SECONDS = 60.0
_TOKENS = 12
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """Where it listens, and what its answers must be."""

    port: int
    model: str
    texts: Mapping[str, str]
    """Prompts with the continuations of an engine that nobody else uses."""


Answer = tuple[Verdict, str]
Client = Callable[[Server, random.Random], Answer]


def _post(
    server: Server, path: str, body: bytes, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(_HOST, server.port, timeout=_SECONDS)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _body(server: Server, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "prompt": prompt, "max_tokens": _TOKENS, "temperature": 0, **fields}


def _refused(status: int, content: bytes) -> Answer:
    """A proper error: of the client, or of a server that has too much to do, in OpenAI's form."""
    said = content[:300].decode(errors="replace")
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return Verdict.WRONG, f"status {status}, no error in OpenAI's form: {said}"
    proper = (400 <= status < 500 or status == 503) and isinstance(message, str) and message
    return (Verdict.NOTICED if proper else Verdict.WRONG), f"status {status}: {said}"


def _is(text: str, wanted: str) -> Answer:
    return (Verdict.HARMLESS, text) if text == wanted else (Verdict.WRONG, f"{text!r} instead of {wanted!r}")


def whole(server: Server, choice: random.Random) -> Answer:
    """A completion."""
    prompt = choice.choice(list(server.texts))
    status, content = _post(server, "/v1/completions", json.dumps(_body(server, prompt)).encode())
    if status != 200:
        return _refused(status, content)
    return _is(json.loads(content)["choices"][0]["text"], server.texts[prompt])


def streamed(server: Server, choice: random.Random) -> Answer:
    """A completion in events."""
    prompt = choice.choice(list(server.texts))
    body = json.dumps(_body(server, prompt, stream=True)).encode()
    status, content = _post(server, "/v1/completions", body)
    if status != 200:
        return _refused(status, content)
    events = [line.removeprefix(b"data: ") for line in content.split(b"\n\n") if line]
    if events[-1] != b"[DONE]":
        return Verdict.WRONG, f"the stream ends with {events[-1][:300]!r}"
    return _is(
        "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]), server.texts[prompt]
    )


def several(server: Server, choice: random.Random) -> Answer:
    """Two prompts in one request."""
    prompts = choice.sample(list(server.texts), 2)
    status, content = _post(
        server, "/v1/completions", json.dumps(_body(server, "") | {"prompt": prompts}).encode()
    )
    if status != 200:
        return _refused(status, content)
    given = {part["index"]: part["text"] for part in json.loads(content)["choices"]}
    return _is(str([given[0], given[1]]), str([server.texts[prompt] for prompt in prompts]))


def chat(server: Server, choice: random.Random) -> Answer:
    """A chat of one message."""
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": _TOKENS}
    body |= {"temperature": choice.choice([0, 0.7]), "seed": 1}
    status, content = _post(server, "/v1/chat/completions", json.dumps(body).encode())
    if status != 200:
        return _refused(status, content)
    message = json.loads(content)["choices"][0]["message"]
    proper = message["role"] == "assistant" and isinstance(message["content"], str)
    return (Verdict.HARMLESS if proper else Verdict.WRONG), str(message)


WELL: tuple[Client, ...] = (whole, streamed, several, chat)


def bad_bodies(server: Server) -> list[bytes]:
    """Bodies of a completion that must be refused."""
    fields: list[dict[str, Any]] = [
        {"model": "another"}, {"max_tokens": 10**9}, {"max_tokens": -1}, {"max_tokens": 2**70},
        {"max_tokens": "many"}, {"temperature": -1}, {"temperature": 1e400}, {"temperature": "NaN"},
        {"top_p": 7}, {"top_k": -5}, {"prompt": "x" * 100_000}, {"prompt": [3] * 100_000},
        {"prompt": [-1]}, {"prompt": [10**9]}, {"prompt": [2**70]}, {"prompt": None}, {"prompt": 3},
        {"prompt": {"a": 1}}, {"prompt": ["x"] * 5000}, {"prompt": []}, {"stop": ["x"] * 10_000},
        {"stop": "x" * 100_000}, {"stop": 3}, {"n": 10**6}, {"logprobs": 10**9}, {"seed": "x"},
        {"logit_bias": {"1": 500}}, {"logit_bias": {"x": 5}}, {"unknown": 1}, {"u" * 50_000: 1},
        {"stop_token_ids": [2**70]}, {"stream_options": {"include_usage": True}},
    ]  # fmt: skip
    whole = [json.dumps(_body(server, "Hi") | change).encode() for change in fields]
    deep = b'{"model": "m", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    return [*whole, deep, b"[" * 100_000, b"", b"null", b"[]", b"{", b"\xff\xfe\x00", b"3", b'"text"',
            b'{"prompt": "\\ud800"', b"{" + b'"a":1,' * 100_000 + b'"b":1}', b"9" * 100_000]  # fmt: skip


def bad_body(server: Server, choice: random.Random) -> Answer:
    """A field or a body that cannot be."""
    body = choice.choice(bad_bodies(server))
    status, content = _post(server, choice.choice(["/v1/completions", "/v1/chat/completions"]), body)
    verdict, said = _refused(status, content)
    return verdict, f"{body[:100]!r}: {said}"


def surrogate(server: Server, choice: random.Random) -> Answer:
    """Half of a character in the text: refused, or answered."""
    status, content = _post(
        server,
        "/v1/completions",
        json.dumps(_body(server, "a \ud800 b", echo=choice.random() < 0.5)).encode(),
    )
    return (Verdict.HARMLESS, "") if status == 200 else _refused(status, content)


def messages(server: Server, choice: random.Random) -> Answer:
    """Very many messages, or very odd ones."""
    given: Any = choice.choice(
        [
            [{"role": "user", "content": "x"}] * 20_000,
            [{"role": "x" * 10**5, "content": "x"}],
            [{"role": "user", "content": {"a": [[[]]] * 1000}}],
            [],
            [3],
            "x",
        ]
    )
    body = json.dumps({"model": server.model, "messages": given}).encode()
    return _refused(*_post(server, "/v1/chat/completions", body))


def large(server: Server, _: random.Random) -> Answer:
    """A body of many megabytes; the server may close before it has come."""
    try:
        return _refused(*_post(server, "/v1/completions", b'{"prompt": "' + b"x" * (24 * 2**20) + b'"}'))
    except (ConnectionError, BrokenPipeError, http.client.HTTPException) as error:
        return Verdict.NOTICED, str(error)


def garbage(server: Server, choice: random.Random) -> Answer:
    """What is no HTTP. Whatever comes back, it is no 500, and the server closes the connection or waits."""
    sent = choice.choice(
        [
            b"\x00" * 1000,
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
            b"DELETE /v1/completions HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n",
        ]
    )
    try:
        with socket.create_connection((_HOST, server.port), timeout=1.0) as connection:
            connection.sendall(sent)
            answer = connection.recv(1000)
    except (TimeoutError, ConnectionError) as error:
        return Verdict.NOTICED, str(error)
    wrong = b" 500 " in answer[:20] or b" 200 " in answer[:20]
    return (Verdict.WRONG if wrong else Verdict.NOTICED), f"{sent[:60]!r}: {answer[:100]!r}"


def aborted(server: Server, choice: random.Random) -> Answer:
    """A connection that ends, in order or by a reset, before, in or after its request."""
    body = json.dumps(_body(server, "Once", stream=True, max_tokens=40)).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection((_HOST, server.port), timeout=_SECONDS) as connection:
        connection.sendall(request[: choice.choice([0, 10, len(request) - 5, len(request)])])
        if choice.random() < 0.5:
            time.sleep(choice.random() * 0.05)
        if choice.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return Verdict.HARMLESS, "nobody listens"


def slow(server: Server, choice: random.Random) -> Answer:
    """A body that comes slowly and does not end."""
    with socket.create_connection((_HOST, server.port), timeout=_SECONDS) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(choice.randint(1, 10)):
            connection.sendall(b"x")
            time.sleep(0.05)
    return Verdict.HARMLESS, "nobody listens"


BADLY: tuple[Client, ...] = (
    bad_body, bad_body, bad_body, surrogate, messages, large, garbage, garbage, aborted, aborted, slow,
)  # fmt: skip
