"""The HTTP application: OpenAI-style completions and chat over one engine,
with limits, health and metrics."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from lckv.generation.engine import Engine
from lckv.serving import errors
from lckv.serving.answers import Header
from lckv.serving.body import read_body
from lckv.serving.guard import Guard
from lckv.serving.limits import ServingLimits
from lckv.serving.metrics import ServerMetrics
from lckv.serving.preparing import Prepared, prepare_chat, prepare_completion
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
        openapi_url=None,
        redirect_slashes=False,  # to what the client says this host is
    )
    errors.install(app)
    app.add_middleware(Guard, limits=limits, metrics=metrics, api_key=api_key)
    _add_routes(app, served)
    return app


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
    async def completions(request: Request) -> Response:
        return await _answer(served, request, "completion", prepare_completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(served, request, "chat", prepare_chat)


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
