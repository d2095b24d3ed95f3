"""The application: answers are the engine's, whole and streamed; what cannot be done is said; nothing
leaks."""

import asyncio
import json
import threading
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lckv.generation.engine import Engine
from lckv.serving.app import create_app
from tests.lckv.serving.served_model import (
    CONTEXT,
    LIMITS,
    PROMPT,
    ask,
    byte_tokenizer,
    greedy,
    make_app,
    make_engine,
)

JSON_TYPE = {"Content-Type": "application/json"}


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
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 12,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 0},  # shorter than a page
    }


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
    assert all(piece["usage"] is None for piece in pieces[:-1])
    assert all("usage" not in piece for piece in events(ask(client, stream=True)))


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


def texts_of(answer: httpx.Response) -> list[str]:
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def test_several_answers_to_a_prompt_are_reproducible_and_differ(client: TestClient) -> None:
    drawn = {"temperature": 1.5, "seed": 7, "max_tokens": 20, "ignore_eos": True}
    three = texts_of(ask(client, n=3, **drawn))
    assert len(set(three)) == 3
    assert texts_of(ask(client, n=2, best_of=2, **drawn)) == three[:2]
    assert texts_of(ask(client, **drawn)) == three[:1]
    assert texts_of(ask(client, n=2, **{**drawn, "seed": 8}))[1] not in three
    assert texts_of(ask(client, n=2, prompt=["x", PROMPT], **drawn))[2:] == three[:2]
    unseeded = texts_of(ask(client, n=2, **{**drawn, "seed": None}))
    assert unseeded[0] != unseeded[1]


def test_a_prompt_with_several_answers_is_counted_once(client: TestClient) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 16, "total_tokens": 26}
    usage["prompt_tokens_details"] = {"cached_tokens": 0}
    fields = {"prompt": [PROMPT, "x"], "n": 2, "max_tokens": 4, "ignore_eos": True}
    assert ask(client, **fields).json()["usage"] == usage
    pieces = events(ask(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1]["usage"] == usage


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("as_text", [True, False])
def test_echo_with_logprobs(client: TestClient, tokens: int, as_text: bool) -> None:
    ids = byte_tokenizer()(PROMPT).input_ids
    asked = {"prompt": PROMPT if as_text else ids, "echo": True, "logprobs": 1, "max_tokens": tokens}
    answer = ask(client, **asked).json()
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT + (greedy(PROMPT, tokens) if tokens else "")
    assert answer["usage"]["completion_tokens"] == tokens and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][: len(ids)] == list(PROMPT)
    assert logprobs["text_offset"][: len(ids)] == list(range(len(ids)))
    assert {len(column) for column in logprobs.values()} == {len(ids) + tokens}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    scores = make_engine().score([ids])[0]
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(scores.logprobs.tolist(), abs=1e-4)
    pieces = events(ask(client, **asked, stream=True))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]
    streamed = [piece["choices"][0]["logprobs"] for piece in pieces]
    for name, column in logprobs.items():
        assert [entry for part in streamed if part for entry in part[name]] == column


def test_echo_of_several_prompts_and_answers(client: TestClient) -> None:
    choices = ask(client, prompt=["ab", "xyz"], n=2, echo=True, logprobs=0, max_tokens=2).json()["choices"]
    assert [choice["text"][:3].rstrip() for choice in choices[2:]] == ["xyz", "xyz"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [4, 4, 5, 5]
    assert choices[0]["logprobs"]["top_logprobs"] == [None, {}, {}, {}]


def test_echo_alone(client: TestClient) -> None:
    (choice,) = ask(client, echo=True, max_tokens=0).json()["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (PROMPT, None, "length")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_biases_and_penalties_reach_the_engine(client: TestClient, path: str) -> None:
    def said(**fields: object) -> str:
        choice = ask(client, path, ignore_eos=True, **fields).json()["choices"][0]
        return choice["text"] if path == "completions" else choice["message"]["content"]

    letter = byte_tokenizer()("q").input_ids[0]
    always = {str(letter): 100}
    assert said(logit_bias=always) == "q" * 12
    assert "q" not in said(logit_bias={str(letter): -100})
    bounded = {"logit_bias": {str(letter): 12}}
    assert said(**bounded).count("q") > said(**bounded, frequency_penalty=2, presence_penalty=2).count("q")


def test_several_answers_of_a_chat_in_one_stream(client: TestClient) -> None:
    fields = {"n": 2, "temperature": 1.5, "seed": 3}
    whole = ask(client, "chat/completions", **fields).json()["choices"]
    streamed = {0: "", 1: ""}
    roles, ends = [], []
    for piece in events(ask(client, "chat/completions", **fields, stream=True)):
        (choice,) = piece["choices"]
        streamed[choice["index"]] += choice["delta"].get("content") or ""
        roles += [choice["index"]] if "role" in choice["delta"] else []
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert [streamed[0], streamed[1]] == [choice["message"]["content"] for choice in whole]
    assert sorted(roles) == sorted(ends) == [0, 1]


def test_a_template_that_loops_stops_nobody_else() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    limits = replace(LIMITS, prepare_seconds=2.0, tokenizer_threads=2)

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
        assert " 2 seconds" in response.json()["error"]["message"]
        assert (await asyncio.gather(chat("x"), chat("y"), chat("z")))[2].status_code == 200

    run_app(create_app(make_engine(), tokenizer, model="tiny", limits=limits, api_key=None), story)


def test_a_template_that_makes_much_of_little_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content * 200 }}"
    with TestClient(
        create_app(make_engine(), tokenizer, model="tiny", limits=LIMITS, api_key=None)
    ) as client:
        response = ask(client, "chat/completions", messages=[{"role": "user", "content": "x" * 100}])
    assert "messages: 20000 characters; 0 to 1024 are allowed" in response.json()["error"]["message"]


def test_malformed_bodies_and_unknown_paths(client: TestClient) -> None:
    response = client.post("/v1/completions", content=b'{"model": ', headers=JSON_TYPE)
    assert response.status_code == 400 and "The body is not valid JSON" in response.json()["error"]["message"]
    assert client.post("/v1/completions", content=iter([b"{}"])).status_code == 415
    half = client.post(
        "/v1/completions", content=rb'{"model": "tiny", "prompt": "\ud800"}', headers=JSON_TYPE
    )
    assert half.status_code == 400 and half.json()["error"]["param"] == "prompt"
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    refused = client.get("/v1/completions")
    assert refused.status_code == 405 and "POST" in refused.headers["Allow"]


def test_a_body_may_come_in_chunks(client: TestClient) -> None:
    parts = [b'{"prompt": "Once', b' upon", "temperature": 0, "max_tokens"', b": 12}"]
    answer = client.post("/v1/completions", content=iter(parts), headers=JSON_TYPE)
    assert answer.json()["choices"][0]["text"] == greedy(PROMPT)
    long = client.post("/v1/completions", content=iter([b" " * 1000] * 5), headers=JSON_TYPE)
    assert long.status_code == 413
    assert "The body may have at most 4096 bytes" in long.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny", "/docs", "/openapi.json"]
)
def test_what_can_be_got_has_a_head_and_says_how(client: TestClient, path: str) -> None:
    got, head, options = (client.request(method, path) for method in ("GET", "HEAD", "OPTIONS"))
    assert got.status_code == head.status_code == 200
    assert head.headers["content-type"] == got.headers["content-type"]
    assert (options.status_code, options.headers["Allow"]) == (204, "GET, HEAD, OPTIONS")


def test_what_is_posted_says_how(client: TestClient) -> None:
    options = client.options("/v1/chat/completions")
    assert (options.status_code, options.headers["Allow"]) == (204, "POST, OPTIONS")
    assert client.options("/v1/nothing").status_code == 404


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


def test_one_model_is_shown_by_its_name(client: TestClient) -> None:
    assert client.get("/v1/models/tiny").json() == client.get("/v1/models").json()["data"][0]
    unknown = client.get("/v1/models/some/other")
    assert unknown.status_code == 404
    error = unknown.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "model 'some/other' is not served here; this is 'tiny'" in error["message"]


def test_the_name_of_a_model_may_have_slashes() -> None:
    app = create_app(make_engine(), byte_tokenizer(), model="a/b c", limits=LIMITS, api_key=None)
    with TestClient(app) as client:
        for path in ("a/b c", "a%2Fb%20c"):
            assert client.get(f"/v1/models/{path}").json()["id"] == "a/b c"
        assert client.get("/v1/models/a").status_code == 404


def metrics(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    named = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in named}


def test_the_second_turn_of_a_chat_costs_its_new_tokens() -> None:
    """Counted by the engine, in the answer's numbers and in the metrics; streamed too."""
    engine = make_engine()
    messages = [{"role": "user", "content": "Tell me more."}]
    fields = {"max_tokens": 6, "logit_bias": {"64": 100}, "ignore_eos": True}
    with TestClient(make_app(engine)) as client:
        first = ask(client, "chat/completions", messages=messages, **fields).json()
        assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        answer = first["choices"][0]["message"]["content"]
        assert len(answer) == 6 and len(set(answer)) == 1
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "On."}]
        # The newest token of an answer has not been computed.
        known = first["usage"]["prompt_tokens"] + 5
        pieces = events(
            ask(
                client,
                "chat/completions",
                messages=messages,
                **fields,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        usage = pieces[-1]["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": known}
        assert usage["prompt_tokens"] - known == 1 + len("<user>On.<assistant>")
        values = metrics(client)
        assert values["lckv_prompt_tokens_total"] == known - 5 + usage["prompt_tokens"]
        assert values["lckv_cached_prompt_tokens_total"] == known
        assert values["lckv_pages_in_use"] == 0 < values["lckv_pages_kept"] and values["lckv_prefixes"] == 1
        several = ask(client, "chat/completions", messages=messages, n=3, **fields).json()["usage"]
        assert several["prompt_tokens_details"]["cached_tokens"] == several["prompt_tokens"] - 1
    engine.clear_prefixes()
    assert engine.cache.pages_free == engine.cache.pages


def test_models_health_and_metrics(client: TestClient) -> None:
    model = client.get("/v1/models").json()["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny", CONTEXT)
    assert client.get("/health").json() == {"status": "ok"}
    ask(client)
    values = metrics(client)
    assert values["lckv_generated_tokens_total"] >= 12
    assert values["lckv_pages_free"] > 0
    assert {"lckv_pages_in_use", "lckv_compression_ratio", "lckv_tokens_per_second"} < set(values)
    assert {"lckv_drafted_tokens_total", "lckv_accepted_tokens_total", "lckv_draft_acceptance"} < set(values)
    assert values['lckv_http_responses_total{path="/v1/completions",status="200"}'] >= 1


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
