"""The server as a program: a real client library talks to it, clients leave, and it ends cleanly."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from lckv.generation.loading import load_model
from lckv_megatron.commands import serve
from megatron_ext.errors import ConfigError
from tests.lckv.serving.served_model import byte_tokenizer, write_folder

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS, END_SECONDS = 120, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


def tokens_of(text: str) -> list[int]:
    return list(byte_tokenizer()(text).input_ids)


class Server:
    """A server process, and what it has said."""

    def __init__(self, folder: Path, *options: str, key: str | None = None) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **({"LCKV_API_KEY": key} if key else {}),
        }
        command = [
            sys.executable,
            "-m",
            "lckv_megatron",
            "serve",
            "--model",
            str(folder),
            "--port",
            "0",
            *options,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.folder, self.log = folder, list[str]()
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_SECONDS), self.log
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or "none", max_retries=10, timeout=60
        )

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"serving \S+ at (http://\S+?)/v1", line)
            if found:
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def metric(self, name: str) -> float:
        text = self.client._client.get(f"{self.url}/metrics").text
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])

    def end(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder, "--max-new-tokens", "80", key="secret")
    yield server
    if server.process.poll() is None:
        assert server.end() == 0, server.log


def test_openais_library_completes_streams_and_chats(server: Server) -> None:
    client = server.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask = {"model": "tiny", "prompt": "Once", "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(**ask).choices[0]
    assert whole.finish_reason == "length"
    assert (
        "".join(piece.choices[0].text for piece in client.completions.create(**ask, stream=True))
        == whole.text
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 0}
    answer = client.chat.completions.create(**chat)
    pieces = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    streamed = list(pieces)
    assert (
        "".join(piece.choices[0].delta.content or "" for piece in streamed if piece.choices)
        == answer.choices[0].message.content
    )
    usage = streamed[-1].usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert usage.model_copy(update={"prompt_tokens_details": None}) == answer.usage.model_copy(
        update={"prompt_tokens_details": None}
    )


def test_the_loop_of_a_chat_goes_on(server: Server) -> None:
    messages: list[Any] = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"{turn}"})
        answer = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
        messages.append(answer.choices[0].message)


def test_the_bytes_of_logprobs_are_the_text(server: Server) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "é"}], "max_tokens": 30, "seed": 1}
    chat |= {"logprobs": True, "top_logprobs": 2, "extra_body": {"ignore_eos": True}}
    choice = server.client.chat.completions.create(**chat).choices[0]
    assert len(choice.logprobs.content) == 30
    joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert joined.decode("utf-8", "replace") == choice.message.content
    pieces = server.client.chat.completions.create(**chat, stream=True)
    entries = [
        entry for piece in pieces if piece.choices[0].logprobs for entry in piece.choices[0].logprobs.content
    ]
    assert [(entry.token, entry.bytes) for entry in entries] == [
        (entry.token, entry.bytes) for entry in choice.logprobs.content
    ]


def test_openais_library_finds_the_model(server: Server) -> None:
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="model 'a/b' is not served here") as caught:
        server.client.models.retrieve("a/b")
    assert caught.value.code == "model_not_found"


def test_openais_library_streams_several_answers(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 12, "seed": 5, "n": 2}
    whole = server.client.chat.completions.create(**chat)
    texts = {0: "", 1: ""}
    for piece in server.client.chat.completions.create(**chat, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert texts[0] != texts[1]


def test_openais_library_sends_penalties_and_what_it_has_as_defaults(server: Server) -> None:
    letter = {"logit_bias": {str(tokens_of("q")[0]): 12}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    chat |= {"max_completion_tokens": 12, "store": False, "tool_choice": "none", "parallel_tool_calls": True}
    chat |= {"service_tier": "auto", "modalities": ["text"], "extra_body": {"chat_template_kwargs": {}}}

    def count(**more: Any) -> int:
        answer = server.client.chat.completions.create(**chat, **more)
        return (answer.choices[0].message.content or "").count("q")

    assert count(**letter) > count(**letter, presence_penalty=2, frequency_penalty=2) > 0


def test_openais_library_reads_the_logprobs_of_a_prompt(server: Server) -> None:
    ask = {"model": "tiny", "prompt": tokens_of("Once upon"), "echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = server.client.completions.create(**ask).choices
    assert (choice.text, choice.logprobs.text_offset) == ("Once upon", list(range(9)))
    model, _ = load_model(server.folder)
    with torch.no_grad():
        logits = model(torch.tensor([tokens_of("Once upon")]), use_cache=False).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(tokens_of("Once upon")[1:])[:, None]).squeeze(1)
    first, *found = choice.logprobs.token_logprobs
    assert first is None and found == pytest.approx(expected.tolist(), abs=0.1)  # passes of an iterated map


def test_openais_library_understands_the_errors(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        server.client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens is 999; at most 80") as caught:
        server.client.completions.create(model="tiny", prompt="x", max_tokens=999)
    assert caught.value.param == "max_tokens"
    assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_a_client_that_leaves_frees_its_pages(server: Server) -> None:
    before = server.metric("lckv_cancelled_total")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 80, "ignore_eos": True, "temperature": 0}
    for stream in (True, False):
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps({**body, "stream": stream})
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(f"{head}{content}".encode())
            if stream:
                connection.recv(100)
    deadline = time.monotonic() + 120
    while server.metric("lckv_pages_in_use") > 0 or server.metric("lckv_running") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (
        server.metric("lckv_cancelled_total") >= before
    )  # an answer may have been complete before its client left
    ever_on = {"ignore_eos": True}
    answer = server.client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body=ever_on)
    assert answer.usage.completion_tokens == 2


def test_sigterm_lets_running_answers_end(server: Server) -> None:
    """The last test of this server."""
    found: list[object] = []

    def ask() -> None:
        try:
            answer = server.client.completions.create(
                model="tiny", prompt="x", max_tokens=80, extra_body={"ignore_eos": True}
            )
            found.append(answer.usage.completion_tokens)
        except openai.OpenAIError as error:
            found.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 30
    while server.metric("lckv_running") == 0 and asking.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert server.end() == 0, server.log
    assert server.log[-1].endswith("stopped serving: signal SIGTERM\n")
    asking.join(30)
    assert found == [80]
    assert not [line for line in server.log if "Traceback" in line], "".join(server.log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--max-new-tokens", "97"],
            "--max-new-tokens is 97; it must be at most the model's context, 96 tokens",
        ),
        (
            ["--context-tokens", "40", "--max-new-tokens", "41"],
            "--max-new-tokens is 41; it must be at most the model's context, 40 tokens",
        ),
        (
            ["--context-tokens", "97"],
            "--context-tokens is 97; it must be at most the model's longest context, 96 tokens",
        ),
        (["--port", "99999"], "--host 127.0.0.1 --port 99999: cannot listen there"),
        (["--memory", "1KB"], "memory_bytes is 1000; it must be at least"),
    ],
)
def test_bad_options_end_it_with_one_line(folder: Path, options: list[str], message: str, capfd) -> None:
    from lckv_megatron.commands.serve import main

    assert main(["--model", str(folder), "--port", "0", *options]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("origin", ["chat.example.org", "https://a.example/", "https://A.example", "**", ""])
def test_what_is_no_origin_is_refused(origin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.parser().parse_args(["--model", "x", "--allowed-origins", origin])
    assert f"{origin!r} is no origin such as https://chat.example.org" in capsys.readouterr().err


def test_origins_are_those_that_browsers_send() -> None:
    origins = ["https://a.example", "http://localhost:3000", "http://[::1]:80", "null", "*"]
    assert (
        serve.parser().parse_args(["--model", "x", "--allowed-origins", *origins]).allowed_origins == origins
    )


def test_a_port_in_use_is_said_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def load(options: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(serve, "load", load)
    monkeypatch.setattr(serve, "set_up_logging", lambda: None)  # it would take caplog's handler away
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert serve.main(["--model", str(tmp_path), "--port", port]) == 2
    (line,) = caplog.messages
    assert f"--host 127.0.0.1 --port {port}: cannot listen there: " in line
    assert line.endswith("choose another --port.")
    assert len(line.splitlines()) == 1


def test_of_two_servers_that_start_together_the_slower_one_says_why() -> None:
    first = serve._listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = serve._listen("127.0.0.1", port)  # nobody listens yet
    options = argparse.Namespace(host="127.0.0.1", port=port)
    with first, second:
        serve._begin_to_listen(first, options)
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen there: .*choose another --port"):
            serve._begin_to_listen(second, options)


def test_other_signals_stop_it_with_one_line_too(folder: Path) -> None:
    """Others than those that uvicorn knows."""
    server = Server(folder)
    server.process.send_signal(signal.SIGUSR1)
    assert server.process.wait(END_SECONDS) == 0, server.log
    server._reader.join(10)
    assert server.log[-1].endswith("stopped serving: signal SIGUSR1\n")
    assert not [line for line in server.log if "Traceback" in line]
