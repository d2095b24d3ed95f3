"""Requests to the server, with abuse beside them: answers are right or a proper error, and nothing leaks."""

import http.client
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lckv_megatron.__main__ import main as run_program
from lckv_megatron.faults.clients import BADLY, WELL, Answer, Client, Server
from lckv_megatron.faults.damage import Step
from lckv_megatron.faults.materials import CONTEXT
from lckv_megatron.faults.tally import Tally, Verdict

PROMPTS = ("Once upon", "def main(", "0, 1, 1, 2,", "Dear", "x", "The quick brown fox")
_TOKENS = 12
_CLIENTS = 8
_START_SECONDS = 120.0


def requests(model: Path, number: int, seed: int, step: Step) -> Iterator[Tally]:
    """Sends `number` requests to a server of `model`, about one of three of them badly."""
    texts = _texts(model)
    port = _free_port()
    child = _serving(model, port)
    server = Server(port, model.name, texts)
    well, badly, after = Tally("requests: proper"), Tally("requests: abuse"), Tally("requests: server")
    try:
        _wait_for(server)
        with ThreadPoolExecutor(_CLIENTS) as clients:
            plan = random.Random(seed)
            work = []
            for index in range(number):
                kinds, tally = (BADLY, badly) if plan.random() < 1 / 3 else (WELL, well)
                client = plan.choice(kinds)
                work.append((client, tally, clients.submit(_ask, client, server, f"{seed} {index}")))
            for client, tally, future in work:
                verdict, said = future.result()
                tally.add(verdict, client.__name__, said)
                step(1)
        _judge(server, after)
    finally:
        os.kill(child, signal.SIGTERM)
        _await_end(child, after)
    yield from (well, badly, after)


def _ask(client: Client, server: Server, seed: str) -> Answer:
    try:
        return client(server, random.Random(seed))
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        return Verdict.WRONG, f"{type(error).__name__}: {error}"


def _texts(model: Path) -> dict[str, str]:
    """The continuation of each prompt, by an engine of its own."""
    from lckv.generation.config import EngineConfig
    from lckv.generation.engine import Engine
    from lckv.generation.loading import load_model
    from lckv.generation.sampling import SamplingParams

    loaded, tokenizer = load_model(model, device="cpu")
    assert tokenizer is not None
    engine = Engine(loaded, EngineConfig(memory_bytes=2**20, max_batch_size=1), tokenizer=tokenizer)
    params = SamplingParams(temperature=0, max_new_tokens=_TOKENS)
    return {prompt: str(engine.generate([tokenizer(prompt).input_ids], params)[0].text) for prompt in PROMPTS}


def _serving(model: Path, port: int) -> int:
    child = os.fork()
    if child:
        return child
    words = ["--model", str(model), "--port", str(port), "--memory", "2MiB", "--device", "cpu"]
    words += ["--max-new-tokens", str(CONTEXT // 2), "--shutdown-seconds", "5"]
    try:
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
        status = run_program(["serve", *words])
    except BaseException:  # noqa: BLE001 - told by the status
        status = 1
    os._exit(status)


def _get(server: Server, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def _wait_for(server: Server) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            if _get(server, "/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server does not answer within {_START_SECONDS:g} s")


def _judge(server: Server, tally: Tally) -> None:
    """Whether the server is as it was before."""
    deadline = time.monotonic() + 30
    pages = "?"
    while pages != "0" and time.monotonic() < deadline:
        line = re.search(r"^lckv_pages_in_use (\d+)", _get(server, "/metrics")[1], re.MULTILINE)
        pages = "no such metric" if line is None else line[1]
        time.sleep(0.2)
    tally.add(Verdict.HARMLESS if pages == "0" else Verdict.WRONG, "pages in use at the end", pages)
    status = _get(server, "/health")[0]
    tally.add(Verdict.HARMLESS if status == 200 else Verdict.WRONG, "health at the end", str(status))


def _await_end(child: int, tally: Tally) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            tally.add(Verdict.HARMLESS if code == 0 else Verdict.WRONG, "SIGTERM", f"exit status {code}")
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tally.add(Verdict.WRONG, "SIGTERM", "the server does not end")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
