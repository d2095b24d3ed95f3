"""lm-eval's own client of servers, unmodified, against ours: what it finds is what our adapter finds."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from lm_eval.models.openai_completions import LocalCompletionsAPI

from lckv.generation.config import EngineConfig
from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv.serving.app import create_app
from lckv.serving.connections import server_config
from lckv_megatron.scoring.lm_eval_adapter import adapter
from tests.lckv.serving.served_model import CONTEXT, LIMITS, byte_tokenizer, tiny_model, write_folder

SECONDS = 30
SETTINGS = EngineConfig(memory_bytes=2**20, max_batch_size=4, prefill_tolerance=0)
PAIRS = [
    ("Once upon", " a time"),
    ("Once upon", " no"),
    ("", "é and more"),
    ("x" * 200, " cut from the left"),
    ("The quick", " brown fox"),
]
UNTIL = {"until": ["e", "\n\n"], "max_gen_toks": 12}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCompletionsAPI]:
    folder = write_folder(tmp_path_factory.mktemp("models") / "tiny")
    limits = replace(LIMITS, max_prompt_tokens=CONTEXT - 1, max_body_bytes=2**20, max_prompt_logprobs=10_000)
    engine = Engine(tiny_model(), SETTINGS, tokenizer=byte_tokenizer())
    app = create_app(engine, byte_tokenizer(), model="tiny", limits=limits, api_key=None)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    deadline = time.monotonic() + SECONDS
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield made(listening.getsockname()[1], folder)
    finally:
        server.should_exit = True
        thread.join(SECONDS)


def made(port: int, folder: Path) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{port}/v1/completions",
        model="tiny",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        max_length=CONTEXT,
        batch_size=2,
        max_retries=1,
    )


@pytest.fixture(scope="module")
def ours() -> Any:
    engine = Engine(tiny_model(), SETTINGS, tokenizer=byte_tokenizer())
    longest = CONTEXT - 2  # and the last token, which need not be computed: as many as the client sends
    return adapter(engine, byte_tokenizer(), max_length=longest, batch_size=2)


def requests(arguments: list[Any]) -> list[Any]:
    return [SimpleNamespace(args=entry) for entry in arguments]


def test_likelihoods(client: LocalCompletionsAPI, ours: Any) -> None:
    theirs = client.loglikelihood(requests(PAIRS), disable_tqdm=True)
    expected = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    for (found, is_greedy), (score, right) in zip(theirs, expected, strict=True):
        assert found == pytest.approx(score, abs=1e-3)
        assert is_greedy == right
    assert not any(is_greedy for _, is_greedy in theirs)


def test_the_likeliest_continuation_is_greedy(client: LocalCompletionsAPI, ours: Any) -> None:
    tokens = byte_tokenizer()("Once upon").input_ids
    params = SamplingParams(temperature=0, max_new_tokens=3)
    answer = Engine(tiny_model(), SETTINGS).generate([tokens], params)[0].token_ids
    asked = [(("", ""), tokens, [*answer])]
    (theirs,) = client._loglikelihood_tokens(asked, disable_tqdm=True)
    (expected,) = ours._loglikelihood_tokens(asked, disable_tqdm=True)
    assert theirs == (pytest.approx(expected[0], abs=1e-3), True)


def test_likelihoods_of_whole_texts(client: LocalCompletionsAPI, ours: Any) -> None:
    texts = [("Once upon a time",), ("long " * 50,)]
    theirs = client.loglikelihood_rolling(requests(texts), disable_tqdm=True)
    short = ours.loglikelihood_rolling(requests(texts[:1]), disable_tqdm=True)
    assert theirs[0] == pytest.approx(short[0], abs=1e-3)
    assert len(theirs) == 2


def test_answers(client: LocalCompletionsAPI, ours: Any) -> None:
    asked = [("Once upon", {**UNTIL}), ("x", {**UNTIL}), ("The quick", {**UNTIL, "until": ["never"]})]
    theirs = client.generate_until(requests([(text, dict(more)) for text, more in asked]), disable_tqdm=True)
    assert theirs == ours.generate_until(requests(asked), disable_tqdm=True)
