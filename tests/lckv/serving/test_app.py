"""The application: answers are the engine's, whole and streamed; what cannot be done is said; nothing
leaks."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lckv.generation.engine import Engine
from lckv.generation.sampling import SamplingParams
from lckv.serving.app import create_app
from lckv.serving.errors import ApiError
from lckv.serving.protocol import chat_request, completion_request
from tests.lckv.serving.served_model import CONTEXT, LIMITS, byte_tokenizer, make_app, make_engine

PROMPT = "Once upon"
JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(make_app(engine)) as client:
        yield client
        assert wait_for(lambda: engine.stats().pages_in_use == 0)


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def greedy(prompt: str, tokens: int = 12) -> str:
    """The answer of an engine of its own."""
    ids = byte_tokenizer()(prompt).input_ids
    completion = make_engine().generate([ids], SamplingParams(temperature=0, max_new_tokens=tokens))[0]
    return completion.text


def ask(client: TestClient, path: str = "completions", **fields) -> httpx.Response:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    body |= {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    body |= fields
    return client.post(f"/v1/{path}", json={name: value for name, value in body.items() if value is not ...})


def events(response: httpx.Response) -> list[dict]:
    """What a stream has sent, without its end."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_the_engines(client: TestClient) -> None:
    answer = ask(client).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["choices"][0]["text"] == greedy(PROMPT)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}


def test_prompts_as_texts_and_as_tokens(client: TestClient) -> None:
    tokens = byte_tokenizer()(PROMPT).input_ids
    texts = [choice["text"] for choice in ask(client, prompt=[PROMPT, "x"]).json()["choices"]]
    assert texts == [greedy(PROMPT), greedy("x")]
    assert ask(client, prompt=tokens).json()["choices"][0]["text"] == texts[0]
    assert ask(client, prompt=[tokens, [5]]).json()["choices"][0]["text"] == texts[0]


def test_a_stream_has_the_same_text(client: TestClient) -> None:
    pieces = events(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece["choices"][0]["text"] for piece in pieces[:-1]) == greedy(PROMPT)
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]][-1] == "length"
    assert pieces[-1]["usage"]["completion_tokens"] == 12 and pieces[-1]["choices"] == []


def test_several_answers_in_one_stream(client: TestClient) -> None:
    texts = {0: "", 1: ""}
    for piece in events(ask(client, prompt=[PROMPT, "x"], stream=True)):
        texts[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert texts == {0: greedy(PROMPT), 1: greedy("x")}


def test_chat_goes_through_the_template(client: TestClient) -> None:
    whole = ask(client, "chat/completions").json()
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["content"] == greedy("<user>Hi<assistant>")
    pieces = events(ask(client, "chat/completions", stream=True))
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == greedy(
        "<user>Hi<assistant>"
    )


def test_parts_of_text_are_text(client: TestClient) -> None:
    content = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    answer = ask(client, "chat/completions", messages=[{"role": "user", "content": content}]).json()
    assert answer["choices"][0]["message"]["content"] == greedy("<user>Hi<assistant>")


def test_echo_stop_and_logprobs(client: TestClient) -> None:
    text = greedy(PROMPT)
    assert ask(client, echo=True).json()["choices"][0]["text"] == PROMPT + text
    stopped = ask(client, stop=text[4]).json()["choices"][0]
    assert stopped["text"] == text[: text.index(text[4])] and stopped["finish_reason"] == "stop"
    logprobs = ask(client, logprobs=2).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 12
    assert all(
        max(best.values()) == own
        for best, own in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
    )
    entry = ask(client, "chat/completions", logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"][
        "content"
    ][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] and len(entry["top_logprobs"]) == 2


def test_a_seed_gives_the_same_answer_whatever_else_runs(client: TestClient) -> None:
    alone = ask(client, temperature=1.0, seed=7).json()["choices"][0]["text"]
    among = ask(client, temperature=1.0, seed=7, prompt=[PROMPT, "a", "b"]).json()["choices"][0]["text"]
    assert alone == among != ask(client, temperature=1.0, seed=8).json()["choices"][0]["text"]


BAD = [
    ({"prompt": ""}, 400, "prompt is empty; it must have at least one token"),
    ({"prompt": []}, 400, "0 prompts; 1 to 4 are allowed"),
    ({"prompt": ["a"] * 5}, 400, "5 prompts; 1 to 4 are allowed"),
    ({"prompt": [300]}, 400, "the model's tokens are 0 to 256"),
    ({"prompt": "x" * 65}, 400, "prompt: 65 tokens; at most 64 are allowed"),
    ({"max_tokens": 41}, 400, "max_tokens is 41; at most 40 are allowed"),
    ({"prompt": "x" * 60, "max_tokens": 40}, 400, "together they may be at most 96"),
    ({"max_tokens": 0}, 400, "max_tokens is 0; it must be an integer of at least 1"),
    ({"temperature": -1}, 400, "temperature is -1; it must be"),
    ({"top_p": 0}, 400, "top_p is 0; it must be above 0"),
    ({"n": 2}, 400, "n is 2; this server only supports 1"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty is 0.5; this server only supports 0 and null"),
    ({"best_of": 2}, 400, "best_of is 2; this server only supports 1 and null"),
    ({"n": True}, 400, "n is True; this server only supports 1 and null"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias is {'5': 1}; this server only supports {} and null"),
    ({"suffix": "x"}, 400, "suffix is 'x'; this server only supports '' and null"),
    ({"stream": "yes"}, 400, "stream is 'yes'; it must be true or false"),
    ({"max_tokens": "5"}, 400, "max_tokens is '5'; it must be an integer"),
    ({"max_tokens": True}, 400, "max_tokens is True; it must be an integer"),
    ({"stop": ["a", ""]}, 400, "stop[1] is ''; it must be a text that is not empty"),
    ({"stop": [7]}, 400, "stop[0] is 7; it must be a text"),
    ({"stop": ["a"] * 65}, 400, "stop: 65 texts; 0 to 64 are allowed"),
    ({"stop_token_ids": [999]}, 400, "stop_token_ids has 999; the model's tokens are 0 to 256"),
    ({"logprobs": 21}, 400, "logprobs is 21; it must be an integer from 0 to 20"),
    ({"prompt": ["a", 7]}, 400, "prompt[1] is 7; it must be a text or a list of token ids"),
    ({"prompt": [5, "a"]}, 400, "prompt[1] is 'a'; it must be an integer"),
    ({"prompt": [5] * 65}, 400, "prompt: 65 tokens; at most 64 are allowed"),
    ({"prompt": ["a", "x" * 65]}, 400, "prompt[1]: 65 tokens; at most 64 are allowed"),
    ({"prompt": "x" * 1025}, 400, "prompt: 1025 characters; at most 1024 are allowed"),
    ({"prompt": 7}, 400, "prompt is 7; it must be a text, a list of texts"),
    ({"prompt": None}, 400, "prompt is missing; it must be"),
    ({"model": 7}, 400, "model is 7; it must be a text"),
    ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x: there is no such field"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options is given, but stream is false"),
    ({"echo": True, "logprobs": 1}, 400, "echo with logprobs is not supported"),
    ({"prompts": "x"}, 400, "prompts: there is no such field"),
    ({"prompt": ...}, 400, "prompt is missing; it must be a text"),
    ({"temperature": "hot"}, 400, "temperature is 'hot'; it must be a number"),
    ({"model": "other"}, 404, "model 'other' is not served here; this is 'tiny'"),
    ({"prompt": "x" * 5000}, 413, "The body may have at most 4096 bytes"),
]


@pytest.mark.parametrize(("fields", "status", "message"), BAD, ids=[case[2] for case in BAD])
def test_what_cannot_be_done_is_said(client: TestClient, fields: dict, status: int, message: str) -> None:
    response = ask(client, **fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    assert status == 413 or error["param"] in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: 0 messages; 1 to 1024 are allowed"),
        ({"messages": "Hi"}, "messages is 'Hi'; it must be a list"),
        ({"messages": [{"role": "user", "content": "x"}, "Hi"]}, "messages[1] is 'Hi'; it must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing; it must be a text"),
        (
            {"messages": [{"role": "user", "content": 7}]},
            "messages[0].content is 7; it must be a text, or a list",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "name": "Bob"}]},
            "messages[0].name is 'Bob'; this server",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "nmae": "Bob"}]},
            "messages[0].nmae: there is no such field",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages[0].tool_calls is [{'id': 'a'}]; this server only supports [] and null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
            "messages[0].content[0].cache_control: there is no such field",
        ),
        ({"messages": [{"role": "user", "content": "x" * 1025}]}, "messages: 1025 characters; at most 1024"),
        ({"max_tokens": 41}, "max_tokens is 41; at most 40 are allowed"),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "max_completion_tokens is 6 and max_tokens is 5; give one",
        ),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens is 0; it must be"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; it must be an integer from 0 to 20"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format is {'type': 'json_object'}; this server",
        ),
        (
            {"tool_choice": "required"},
            "tool_choice is 'required'; this server only supports 'none' and 'auto'",
        ),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs: there is no such field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type is 'image_url'; only 'text' is supported",
        ),
        (
            {"messages": [{"role": "king", "content": "x"}]},
            "messages[0].role is 'king'; it must be one of system, developer, user",
        ),
        ({"top_logprobs": 2}, "top_logprobs is given, but logprobs is false"),
        (
            {"tools": [{"type": "function"}]},
            "tools is [{'type': 'function'}]; this server only supports [] and null",
        ),
    ],
)
def test_bad_conversations(client: TestClient, fields: dict, message: str) -> None:
    response = ask(client, "chat/completions", **fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_the_servers_own_messages_are_accepted(client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    first = ask(client, "chat/completions", messages=messages, max_tokens=4).json()["choices"][0]["message"]
    assert first["refusal"] is None
    nothing = dict.fromkeys(
        ("tool_calls", "function_call", "audio", "reasoning", "reasoning_content", "name")
    )
    text = f"<user>Hi<assistant>{first['content']}<user>x<assistant>"
    for more in ({}, {**nothing, "annotations": []}):
        turns = [*messages, {**first, **more}, {"role": "user", "content": "x"}]
        second = ask(client, "chat/completions", messages=turns)
        assert second.json()["choices"][0]["message"]["content"] == greedy(text)
    empty = [{"role": "assistant", "content": None, "refusal": None}, *messages]
    answer = ask(client, "chat/completions", messages=empty).json()["choices"][0]["message"]["content"]
    assert answer == greedy("<assistant><user>Hi<assistant>")


_BOTH = [
    "stream",
    "stream_options",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "user",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
]
_COMPLETIONS = ["echo", "best_of", "suffix"]
_CHATS = [
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "parallel_tool_calls",
    "store",
    "response_format",
    "modalities",
    "audio",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "metadata",
    "service_tier",
    "web_search_options",
    "safety_identifier",
    "prompt_cache_key",
]


@pytest.mark.parametrize(("path", "names"), [("completions", _COMPLETIONS), ("chat/completions", _CHATS)])
def test_null_is_as_if_a_field_were_not_there(client: TestClient, path: str, names: list[str]) -> None:
    nothing = ask(client, path, **dict.fromkeys([*_BOTH, *names]))
    assert nothing.status_code == 200
    assert nothing.json()["choices"] == ask(client, path).json()["choices"]


def test_values_that_change_nothing_are_accepted(client: TestClient) -> None:
    defaults = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me"}
    assert ask(client, best_of=1, suffix="", **defaults).status_code == 200
    assert (
        ask(
            client,
            "chat/completions",
            tools=[],
            tool_choice="auto",
            parallel_tool_calls=True,
            response_format={"type": "text"},
            modalities=["text"],
            store=False,
            **defaults,
        ).status_code
        == 200
    )


def test_a_chat_may_say_its_length_in_either_way(client: TestClient) -> None:
    for fields in (
        {"max_tokens": 3},
        {"max_tokens": ..., "max_completion_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 3},
    ):
        assert ask(client, "chat/completions", **fields).json()["usage"]["completion_tokens"] == 3
    answer = ask(client, "chat/completions", max_tokens=..., ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == LIMITS.max_new_tokens


def test_a_template_that_loops_stops_nobody_else() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    limits = replace(LIMITS, prepare_seconds=0.5, tokenizer_threads=2)

    async def story(client: httpx.AsyncClient) -> None:
        def chat(content: str):
            messages = [{"role": "user", "content": content}]
            body = {"model": "tiny", "messages": messages, "max_tokens": 2}
            return asyncio.ensure_future(client.post("/v1/chat/completions", json=body))

        looping, fine = chat("loop"), chat("x")
        assert (await fine).status_code == 200
        assert not looping.done()
        response = await looping
        assert response.status_code == 503
        assert "The request was not tokenised after 0.5 seconds" in response.json()["error"]["message"]

    run_app(create_app(make_engine(), tokenizer, model="tiny", limits=limits, api_key=None), story)


def test_what_is_too_much_is_refused_before_it_is_looked_at() -> None:
    for content, message in (
        ({"messages": [7] * 150_000}, "messages: 150000 messages; 1 to 1024 are allowed"),
        ({"prompt": [[7.5]] * 150_000}, "prompt: 150000 prompts; 1 to 4 are allowed"),
        ({"prompt": [7] + ["x"] * 150_000}, "prompt: 150001 tokens; at most 64 are allowed"),
        ({"prompt": "x", "stop": [7] * 150_000}, "stop: 150000 texts; 0 to 64 are allowed"),
        ({"prompt": "x", "stop": "x" * 5000}, "stop: 5000 characters; at most 1024 are allowed"),
        ({"prompt": "x", "stop_token_ids": ["x"] * 150_000}, "stop_token_ids: 150000 tokens; 0 to 64 are"),
    ):
        read = chat_request if "messages" in content else completion_request
        with pytest.raises(ApiError) as caught:
            read({"model": "tiny", **content}, "tiny", LIMITS)
        assert message in caught.value.message


def test_a_template_that_makes_much_of_little_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content * 200 }}"
    with TestClient(
        create_app(make_engine(), tokenizer, model="tiny", limits=LIMITS, api_key=None)
    ) as client:
        response = ask(client, "chat/completions", messages=[{"role": "user", "content": "x" * 100}])
    assert "messages: 20000 characters; at most 1024 are allowed" in response.json()["error"]["message"]


def test_malformed_bodies_and_unknown_paths(client: TestClient) -> None:
    response = client.post("/v1/completions", content=b'{"model": ', headers=JSON_TYPE)
    assert response.status_code == 400 and "The body is not valid JSON" in response.json()["error"]["message"]
    assert client.post("/v1/completions", content=iter([b"{}"])).status_code == 411
    half = client.post(
        "/v1/completions", content=rb'{"model": "tiny", "prompt": "\ud800"}', headers=JSON_TYPE
    )
    assert half.status_code == 400 and half.json()["error"]["param"] == "prompt"
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/completions").status_code == 405


def test_a_model_without_chat_template(engine: Engine) -> None:
    app = create_app(make_engine(), byte_tokenizer(chat=False), model="tiny", limits=LIMITS, api_key=None)
    with TestClient(app) as client:
        assert (
            "no chat template; use /v1/completions"
            in ask(client, "chat/completions").json()["error"]["message"]
        )


def test_the_key_is_asked_for() -> None:
    with TestClient(make_app(make_engine(), api_key="secret")) as client:
        assert ask(client).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_models_health_and_metrics(client: TestClient) -> None:
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny", CONTEXT)
    assert client.get("/health").json() == {"status": "ok"}
    ask(client)
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["lckv_generated_tokens_total"]) >= 12
    assert float(values["lckv_pages_free"]) > 0
    assert {"lckv_pages_in_use", "lckv_compression_ratio", "lckv_tokens_per_second"} < set(values)
    assert float(values['lckv_http_responses_total{path="/v1/completions",status="200"}']) >= 1


class Gate:
    """Holds an engine's steps back until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self._step, self._open = engine.step, threading.Event()
        engine.step = self.step  # type: ignore[method-assign]

    def step(self):
        self._open.wait(30)
        return self._step()

    def open(self) -> None:
        self._open.set()


async def post(client: httpx.AsyncClient, **fields) -> httpx.Response:
    return await client.post(
        "/v1/completions", json={"model": "tiny", "prompt": PROMPT, "temperature": 0, **fields}
    )


def run_app(app: FastAPI, story) -> None:
    """A story told by an asynchronous client, with the application running."""

    async def main() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                await story(client)

    asyncio.run(main())


def test_too_many_requests_are_told_to_come_back() -> None:
    engine = make_engine(max_waiting=2, max_batch_size=1)
    gate = Gate(engine)

    async def story(client: httpx.AsyncClient) -> None:
        tasks = [asyncio.ensure_future(post(client, max_tokens=4)) for _ in range(6)]
        await asyncio.sleep(0.5)
        gate.open()
        statuses = sorted(response.status_code for response in await asyncio.gather(*tasks))
        assert statuses.count(429) >= 3 and statuses.count(200) >= 2
        busy = next(response for task in tasks if (response := task.result()).status_code == 429)
        assert busy.headers["Retry-After"] == "1" and busy.json()["error"]["type"] == "rate_limit_error"
        assert (await post(client, max_tokens=4)).status_code == 200

    run_app(make_app(engine), story)
    assert engine.stats().pages_in_use == 0


def test_a_failing_request_leaves_the_server_alive() -> None:
    engine = make_engine()
    broken = engine.model.lm_head.weight.data[:, :1].clone()

    async def story(client: httpx.AsyncClient) -> None:
        engine.model.lm_head.weight.data[:, :1] = float("nan")
        assert (await post(client)).status_code == 500
        engine.model.lm_head.weight.data[:, :1] = broken
        assert (await post(client)).status_code == 200

    run_app(make_app(engine), story)


def test_a_dead_engine_is_said() -> None:
    engine = make_engine()

    def die():
        raise SystemError("gone")

    engine.step = die  # type: ignore[method-assign]

    async def story(client: httpx.AsyncClient) -> None:
        assert (await post(client)).status_code == 503
        assert (await post(client)).status_code == 503
        assert (await client.get("/health")).status_code == 503

    run_app(make_app(engine), story)


def test_shutdown_ends_what_still_runs() -> None:
    engine = make_engine()
    gate = Gate(engine)
    app = make_app(engine, replace(LIMITS, shutdown_seconds=20))

    async def story(client: httpx.AsyncClient) -> None:
        task = asyncio.ensure_future(post(client, max_tokens=40))
        await asyncio.sleep(0.3)
        gate.open()
        task.cancel()

    run_app(app, story)
    assert engine.stats().pages_in_use == 0 and not engine.has_work
