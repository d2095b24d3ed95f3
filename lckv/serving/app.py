"""The HTTP application: OpenAI-style completions and chat over one engine,
with limits, health and metrics."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.cors import CORSMiddleware

from lckv.generation.engine import Engine
from lckv.serving import errors, openapi
from lckv.serving.answers import Header
from lckv.serving.body import read_body
from lckv.serving.guard import Guard
from lckv.serving.limits import ServingLimits
from lckv.serving.metrics import ServerMetrics
from lckv.serving.preparing import Prepared, prepare_chat, prepare_completion
from lckv.serving.protocol import unknown_model
from lckv.serving.responding import Responder
from lckv.serving.token_logprobs import Kind
from lckv.serving.tokenizing import TokenizerThreads
from lckv.serving.worker import EngineWorker

_ID_PREFIXES: dict[Kind, str] = {"completion": "cmpl", "chat": "chatcmpl"}


@dataclass(frozen=True)
class Served:
    """What the routes work with."""

    worker: EngineWorker
    threads: TokenizerThreads
    responder: Responder
    model: str
    limits: ServingLimits
    metrics: ServerMetrics


def create_app(
    engine: Engine, tokenizer: Any, *, model: str, limits: ServingLimits, api_key: str | None
) -> FastAPI:
    """The application; the engine's thread lives as long as it does. `api_key` None: everyone may ask.

    Raises ValueError for an engine without a tokenizer.
    """
    if engine.texts is None:
        raise ValueError("a server answers with texts; give the engine a tokenizer.")
    worker, metrics = EngineWorker(engine), ServerMetrics(engine)
    threads = TokenizerThreads(
        tokenizer,
        threads=limits.tokenizer_threads,
        waiting=limits.max_preparing,
        seconds=limits.prepare_seconds,
    )
    served = Served(worker, threads, Responder(worker, engine.texts, metrics), model, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        threads.stop()
        await asyncio.to_thread(worker.stop, limits.shutdown_seconds)

    app = FastAPI(
        title="LCKV-Megatron",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # requests are read by hand; see openapi.py
        redirect_slashes=False,  # to what the client says this host is
    )
    errors.install(app)
    app.add_middleware(Guard, limits=limits, metrics=metrics, api_key=api_key)
    if limits.allowed_origins:  # around the guard, whose refusals shall be read too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.allowed_origins,
            allow_methods=("GET", "HEAD", "POST", "OPTIONS"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    _add_routes(app, served)
    return app


def _add_routes(app: FastAPI, served: Served) -> None:
    described = openapi.document(served.limits)
    card = {"id": served.model, "object": "model", "created": 0, "owned_by": "lckv-megatron"}
    card |= {"max_model_len": served.limits.context}

    async def health(_: Request) -> Response:
        healthy = served.worker.healthy
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    async def metrics(_: Request) -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        asked = request.path_params["model"]
        if asked != served.model:
            raise unknown_model(asked, served.model)
        return JSONResponse(card)

    async def completions(request: Request) -> Response:
        return await _answer(served, request, "completion", prepare_completion)

    async def chat(request: Request) -> Response:
        return await _answer(served, request, "chat", prepare_chat)

    async def schema(_: Request) -> Response:
        return JSONResponse(described)

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(described))

    _add_route(app, "/health", health)
    _add_route(app, "/metrics", metrics)
    _add_route(app, "/openapi.json", schema)
    _add_route(app, "/docs", docs)
    _add_route(app, "/v1/models", models)
    _add_route(app, "/v1/models/{model:path}", model)  # names may have slashes
    _add_route(app, "/v1/completions", completions, "POST")
    _add_route(app, "/v1/chat/completions", chat, "POST")


def _add_route(
    app: FastAPI, path: str, endpoint: Callable[[Request], Awaitable[Response]], *methods: str
) -> None:
    """`methods`: default GET and HEAD; OPTIONS tells them."""
    methods = (*(methods or ("GET", "HEAD")), "OPTIONS")

    async def answer(request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": ", ".join(methods)})
        return await endpoint(request)

    app.add_api_route(path, answer, methods=list(methods), response_model=None)


async def _answer(
    served: Served,
    request: Request,
    kind: Kind,
    prepare: Callable[[bytes, str, ServingLimits, Any], Prepared],
) -> Response:
    body = await read_body(request, served.limits)
    prepared = await served.threads.run(
        lambda tokenizer: prepare(body, served.model, served.limits, tokenizer)
    )
    answer_id = f"{_ID_PREFIXES[kind]}-{uuid.uuid4().hex}"
    header = Header(kind, answer_id, request.state.request_id, served.model)
    return await served.responder.respond(request, prepared, header)
