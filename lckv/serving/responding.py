"""Answers on their way to the client: whole, or as server-sent events while they are made."""

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from lckv.generation.detokenize import TokenTexts
from lckv.generation.requests import QueueFullError, TokenEvent
from lckv.serving import errors
from lckv.serving.answers import Header, opening_choice, piece_choice, usage, whole_choice
from lckv.serving.errors import ApiError
from lckv.serving.metrics import ServerMetrics
from lckv.serving.preparing import Prepared
from lckv.serving.token_logprobs import TokenLogprobs
from lckv.serving.worker import Answer, EngineFailedError, EngineWorker

logger = logging.getLogger(__name__)

_DISCONNECT_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Responder:
    """Asks the engine and answers the client."""

    worker: EngineWorker
    texts: TokenTexts
    metrics: ServerMetrics

    async def respond(self, request: Request, prepared: Prepared, header: Header) -> Response:
        """The answer to a request. Raises ApiError where there is none."""
        started = time.monotonic()
        answers = self._submit(prepared, header)
        if prepared.request.stream:
            return StreamingResponse(
                self._stream(prepared, header, answers, started),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        try:
            events = await self._collect(request, answers, started)
        finally:
            for answer in answers:
                answer.cancel()
        if any(of_answer[-1].finish_reason == "error" for of_answer in events):
            raise ApiError(500, errors.FAILED)
        logprobs = self._logprobs(prepared, header)

        def choices_of() -> list[dict[str, Any]]:
            return [
                whole_choice(header.kind, index, of_answer, logprobs[index], prepared.prefixes[index])
                for index, of_answer in enumerate(events)
            ]

        choices = await asyncio.to_thread(choices_of)  # of long prompts there is much to say
        generated = sum(event.token is not None for of_answer in events for event in of_answer)
        numbers = usage(prepared.prompt_tokens, generated)
        return JSONResponse(header.body(choices, piece=False, usage=numbers))

    def _logprobs(self, prepared: Prepared, header: Header) -> list[TokenLogprobs]:
        return [
            TokenLogprobs(
                header.kind,
                self.texts,
                prompt,
                prefix if params.logprobs is not None and params.prompt_logprobs is not None else None,
            )
            for (prompt, params), prefix in zip(prepared.jobs, prepared.prefixes, strict=True)
        ]

    def _submit(self, prepared: Prepared, header: Header) -> list[Answer]:
        """All of them, or none."""
        answers: list[Answer] = []
        try:
            for index, (prompt, params) in enumerate(prepared.jobs):
                answers.append(self.worker.submit(prompt, params, f"{header.answer_id}-{index}"))
        except Exception as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, QueueFullError):
                raise ApiError(429, f"The server is busy: {error}", retry_after=1) from error
            if isinstance(error, EngineFailedError):
                raise ApiError(503, str(error)) from error
            if isinstance(error, ValueError):
                field = str(error).partition(" ")[0]
                param = field if field in ("stop_token_ids", "logit_bias") else prepared.param
                raise ApiError(400, str(error), param=param) from error
            raise
        return answers

    async def _collect(
        self, request: Request, answers: list[Answer], started: float
    ) -> list[list[TokenEvent]]:
        """All events of all answers. A client that goes away in between ends it."""

        async def gather() -> list[list[TokenEvent]]:
            return [[event async for event in self._timed(answer, started)] for answer in answers]

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

    async def _timed(self, answer: Answer, started: float) -> AsyncIterator[TokenEvent]:
        first = True
        async for event in answer:
            if first and event.token is not None:
                self.metrics.first_token_seconds.observe(time.monotonic() - started)
                first = False
            yield event

    async def _stream(
        self, prepared: Prepared, header: Header, answers: list[Answer], started: float
    ) -> AsyncIterator[str]:
        """Server-sent events. The client's leaving ends the generator, which cancels the rest."""
        try:
            async for content in self._pieces(prepared, header, answers, started):
                yield _sse(content)
            yield "data: [DONE]\n\n"
        except EngineFailedError as error:
            yield _sse(errors.error_content(503, str(error), header.request_id))
        except Exception:  # the client is told, as it would be without a stream
            logger.exception("request %s failed", header.request_id)
            yield _sse(errors.error_content(500, errors.FAILED, header.request_id))
        finally:
            for answer in answers:
                answer.cancel()

    async def _pieces(
        self, prepared: Prepared, header: Header, answers: list[Answer], started: float
    ) -> AsyncIterator[dict[str, Any]]:
        no_usage = {"usage": None} if prepared.request.include_usage else {}
        if header.kind == "chat":
            for index in range(len(answers)):
                yield header.body([opening_choice(index)], piece=True, **no_usage)
        generated, logprobs, prefixes = 0, self._logprobs(prepared, header), list(prepared.prefixes)
        async for index, event in _merged([self._timed(answer, started) for answer in answers]):
            generated += event.token is not None
            if event.finish_reason == "error":
                yield errors.error_content(500, errors.FAILED, header.request_id)
                continue
            prefix, prefixes[index] = prefixes[index], ""
            shown = prefix or event.text or event.finish_reason is not None
            if shown or event.logprob is not None or event.prompt_logprobs is not None:
                make = functools.partial(piece_choice, header.kind, index, event, logprobs[index], prefix)
                choice = make() if event.prompt_logprobs is None else await asyncio.to_thread(make)
                yield header.body([choice], piece=True, **no_usage)
        if prepared.request.include_usage:
            yield header.body([], piece=True, usage=usage(prepared.prompt_tokens, generated))


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
