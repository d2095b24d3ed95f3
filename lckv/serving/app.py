"""The HTTP application: OpenAI-style completions and chat over one engine,
with limits, health and metrics."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lckv.generation.engine import Engine
from lckv.generation.requests import QueueFullError, TokenEvent
from lckv.generation.sampling import SamplingParams
from lckv.serving import errors
from lckv.serving.answers import Header, Kind, piece_choice, usage, whole_choice
from lckv.serving.errors import ApiError
from lckv.serving.metrics import ServerMetrics
from lckv.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from lckv.serving.tokenizer import ServedTokenizer
from lckv.serving.worker import Answer, EngineFailedError, EngineWorker

_DISCONNECT_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class ServingLimits:
    """What one client may ask for, and how long things may take."""

    context: int
    """Tokens of prompt and answer together."""
    max_prompt_tokens: int
    max_new_tokens: int
    max_body_bytes: int = 16 * 2**20
    max_prompts: int = 64
    """Prompts in one request."""
    shutdown_seconds: float = 30.0
    """How long the engine may take to end its last step."""


@dataclass(frozen=True)
class Served:
    """What the routes work with."""

    worker: EngineWorker
    tokenizer: ServedTokenizer
    model: str
    limits: ServingLimits
    metrics: ServerMetrics


def create_app(
    engine: Engine, tokenizer: Any, *, model: str, limits: ServingLimits, api_key: str | None
) -> FastAPI:
    """The application; the engine's thread lives as long as it does. `api_key` None: everyone may ask."""
    worker = EngineWorker(engine)
    served = Served(worker, ServedTokenizer(tokenizer), model, limits, ServerMetrics(engine))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop, limits.shutdown_seconds)

    app = FastAPI(title="LCKV-Megatron", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.add_middleware(_Guard, served=served, api_key=api_key)
    _add_routes(app, served)
    return app


class _Guard:
    """Key, size of the body, and counting, around every route. Plain ASGI, so that streams and disconnects
    pass through untouched."""

    def __init__(self, app: ASGIApp, served: Served, api_key: str | None) -> None:
        self._app, self._served, self._api_key = app, served, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refused = _refusal(Request(scope), self._api_key, self._served.limits.max_body_bytes)
        try:
            await (self._app if refused is None else refused)(scope, receive, noting)
        finally:
            self._served.metrics.count(getattr(scope.get("route"), "path", "other"), status)


def _refusal(request: Request, api_key: str | None, max_body_bytes: int) -> JSONResponse | None:
    if api_key is not None and request.url.path.startswith("/v1/"):
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), api_key.encode()):
            message = "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
            return JSONResponse(errors.error_content(401, message), 401, {"WWW-Authenticate": "Bearer"})
    if request.method == "POST":
        length = request.headers.get("content-length")
        if length is None or not length.isdigit():
            return JSONResponse(errors.error_content(411, "The header Content-Length is needed."), 411)
        if int(length) > max_body_bytes:
            return JSONResponse(
                errors.error_content(413, f"The body may have at most {max_body_bytes} bytes."), 413
            )
    return None


def _add_routes(app: FastAPI, served: Served) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = served.worker.healthy
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": served.model, "object": "model", "created": 0, "owned_by": "lckv-megatron"}
        return {"object": "list", "data": [{**entry, "max_model_len": served.limits.context}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check(served, body)
        if body.echo and body.logprobs is not None:
            raise ApiError(
                400, "echo with logprobs is not supported: there are none for the prompt.", param="echo"
            )
        given = body.prompts()
        if not 1 <= len(given) <= served.limits.max_prompts:
            raise ApiError(
                400,
                f"prompt: {len(given)} prompts; 1 to {served.limits.max_prompts} are allowed.",
                param="prompt",
            )
        prompts = [
            await served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given
        ]
        prefixes = [served.tokenizer.decode(prompt) if body.echo else "" for prompt in given]
        jobs = [_job(served, body, prompt, body.max_tokens, body.logprobs, "prompt") for prompt in prompts]
        return await _answer(served, request, body, "completion", jobs, prefixes)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check(served, body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs is given, but logprobs is false.", param="top_logprobs")
        try:
            conversation = body.conversation()
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        prompt = await served.tokenizer.encode_chat(conversation)
        most = min(served.limits.max_new_tokens, max(1, served.limits.context - len(prompt)))
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        jobs = [_job(served, body, prompt, most if asked is None else asked, logprobs, "messages")]
        return await _answer(served, request, body, "chat", jobs, [""])


def _check(served: Served, body: GenerationRequest) -> None:
    if body.model != served.model:
        raise ApiError(
            404, f"model {body.model!r} is not served here; this is {served.model!r}.", param="model"
        )
    problem = body.unsupported()
    if problem is not None:
        raise ApiError(400, problem, param=problem.partition(" ")[0])


Job = tuple[Sequence[int], SamplingParams]


def _job(
    served: Served,
    body: GenerationRequest,
    prompt: Sequence[int],
    new_tokens: int,
    logprobs: int | None,
    param: str,
) -> Job:
    """A prompt within the limits, and how to continue it."""
    limits = served.limits
    if len(prompt) > limits.max_prompt_tokens:
        raise ApiError(
            400,
            f"{param}: {len(prompt)} tokens; at most {limits.max_prompt_tokens} are allowed.",
            param=param,
        )
    if new_tokens > limits.max_new_tokens:
        raise ApiError(
            400,
            f"max_tokens is {new_tokens}; at most {limits.max_new_tokens} are allowed.",
            param="max_tokens",
        )
    if len(prompt) + new_tokens > limits.context:
        raise ApiError(
            400,
            f"{param} has {len(prompt)} tokens and max_tokens is {new_tokens}; together they may be at most "
            f"{limits.context}.",
            param="max_tokens",
        )
    params = body.sampling(max_new_tokens=new_tokens, logprobs=logprobs)
    problems = params.problems()
    if problems:
        raise ApiError(400, " ".join(problems), param=problems[0].partition(" ")[0])
    return prompt, params


async def _answer(
    served: Served,
    request: Request,
    body: GenerationRequest,
    kind: Kind,
    jobs: list[Job],
    prefixes: list[str],
) -> Response:
    prefix = {"completion": "cmpl", "chat": "chatcmpl"}[kind]
    header = Header(kind, f"{prefix}-{uuid.uuid4().hex}", served.model)
    started = time.monotonic()
    answers = _submit(served, header.answer_id, jobs)
    prompt_tokens = sum(len(prompt) for prompt, _ in jobs)
    if body.stream:
        usage_wanted = body.stream_options is not None and body.stream_options.include_usage
        pieces = _stream(served, header, answers, prefixes, prompt_tokens if usage_wanted else None, started)
        return StreamingResponse(
            pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    try:
        events = await _collect(served, request, answers, started)
    finally:
        for answer in answers:
            answer.cancel()
    for answer_events in events:
        if answer_events[-1].finish_reason == "error":
            raise ApiError(500, "the model failed on this request; see the server's log.")
    choices = [
        whole_choice(kind, index, answer_events, served.tokenizer.token_text, prefixes[index])
        for index, answer_events in enumerate(events)
    ]
    generated = sum(event.token is not None for answer_events in events for event in answer_events)
    return JSONResponse(header.body(choices, piece=False, usage=usage(prompt_tokens, generated)))


def _submit(served: Served, answer_id: str, jobs: list[Job]) -> list[Answer]:
    """All of them, or none."""
    answers: list[Answer] = []
    try:
        for index, (prompt, params) in enumerate(jobs):
            answers.append(served.worker.submit(prompt, params, f"{answer_id}-{index}"))
    except Exception as error:
        for answer in answers:
            answer.cancel()
        if isinstance(error, QueueFullError):
            raise ApiError(429, f"The server is busy: {error}", retry_after=1) from error
        if isinstance(error, EngineFailedError):
            raise ApiError(503, str(error)) from error
        if isinstance(error, ValueError):
            raise ApiError(400, str(error)) from error
        raise
    return answers


async def _collect(
    served: Served, request: Request, answers: list[Answer], started: float
) -> list[list[TokenEvent]]:
    """All events of all answers. A client that goes away in between ends it."""

    async def gather() -> list[list[TokenEvent]]:
        return [[event async for event in _timed(served, answer, started)] for answer in answers]

    work = asyncio.ensure_future(gather())
    try:
        while not work.done():
            await asyncio.wait([work], timeout=_DISCONNECT_POLL_SECONDS)
            if not work.done() and await request.is_disconnected():
                raise ApiError(499, "the client has closed the connection.")
        return work.result()
    except EngineFailedError as error:
        raise ApiError(503, str(error)) from error
    finally:
        work.cancel()


async def _timed(served: Served, answer: Answer, started: float) -> AsyncIterator[TokenEvent]:
    first = True
    async for event in answer:
        if first and event.token is not None:
            served.metrics.first_token_seconds.observe(time.monotonic() - started)
            first = False
        yield event


async def _stream(
    served: Served,
    header: Header,
    answers: list[Answer],
    prefixes: list[str],
    prompt_tokens: int | None,
    started: float,
) -> AsyncIterator[str]:
    """Server-sent events. The client's leaving ends the generator, which cancels the rest."""
    generated = 0
    try:
        for index, prefix in enumerate(prefixes):
            opening = (
                {"delta": {"role": "assistant", "content": ""}} if header.kind == "chat" else {"text": prefix}
            )
            if header.kind == "chat" or prefix:
                choice = {"index": index, **opening, "logprobs": None, "finish_reason": None}
                yield _sse(header.body([choice], piece=True))
        async for index, event in _merged([_timed(served, answer, started) for answer in answers]):
            generated += event.token is not None
            if event.finish_reason == "error":
                yield _sse(
                    errors.error_content(500, "the model failed on this request; see the server's log.")
                )
                continue
            if event.text or event.finish_reason is not None or event.logprob is not None:
                yield _sse(
                    header.body(
                        [piece_choice(header.kind, index, event, served.tokenizer.token_text)], piece=True
                    )
                )
        if prompt_tokens is not None:
            yield _sse(header.body([], piece=True, usage=usage(prompt_tokens, generated)))
        yield "data: [DONE]\n\n"
    except EngineFailedError as error:
        yield _sse(errors.error_content(503, str(error)))
    finally:
        for answer in answers:
            answer.cancel()


async def _merged(sources: Sequence[AsyncIterator[TokenEvent]]) -> AsyncIterator[tuple[int, TokenEvent]]:
    """The events of several answers as they come, each with its answer's number."""
    pending = {asyncio.ensure_future(anext(source)): index for index, source in enumerate(sources)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                try:
                    event = task.result()
                except StopAsyncIteration:
                    continue
                yield index, event
                pending[asyncio.ensure_future(anext(sources[index]))] = index
    finally:
        for task in pending:
            task.cancel()


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
