"""Connections of clients, with limits that uvicorn does not have: how many there are, and how long one may be
idle, send its request, or read nothing."""

import asyncio
import functools
import json
import uuid
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lckv.serving.errors import error_content
from lckv.serving.limits import ServingLimits

_LINGER_SECONDS = 1.0
"""How long a connection that was refused stays open, so that its client can read why."""

_GRACE_SECONDS = 1.0
"""What the application has for its own answer to a body that is late."""


def server_config(app: FastAPI, limits: ServingLimits) -> uvicorn.Config:
    """For uvicorn.Server."""
    protocol: Any = functools.partial(LimitedConnection, limits=limits)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # whoever asks may have written them
        server_header=False,
        timeout_keep_alive=max(1, round(limits.idle_seconds)),
        timeout_graceful_shutdown=max(1, round(limits.shutdown_seconds)),
    )


class LimitedConnection(H11Protocol):
    """Closes itself when it has been in one state for too long. A state's time does not begin again with
    every byte, so that slow clients gain nothing."""

    def __init__(self, *arguments: Any, limits: ServingLimits, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._limits = limits
        self._state: tuple[str, int] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuses connections beyond the limit."""
        super().connection_made(transport)
        count, most = len(self.connections), self._limits.max_connections
        if count > 2 * most:  # many are refused and linger
            transport.abort()
        elif count > most:
            self._refused = True
            self._write_error(
                503, f"The server has {most} connections, and no more are allowed; try again later."
            )
            self.loop.call_later(_LINGER_SECONDS, transport.close)
        else:
            self._watch("idle")

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        if self._refused:
            return
        if self._state is not None and self._state[0] == "idle":
            self._watch("head")
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        """The next request may follow."""
        super().on_response_complete()
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        """What was sent is no HTTP."""
        self._write_error(400, msg)
        self.transport.close()

    def _watch_request(self) -> None:
        """Which state the connection is in now."""
        cycle = self.cycle
        if self.conn.their_state is h11.SEND_BODY:
            self._watch("body", id(cycle))
        elif cycle is not None and not cycle.response_complete:
            self._watch("answering", id(cycle))
        elif self._state is None or self._state[0] not in ("idle", "head"):
            self._watch("idle")

    def _watch(self, name: str, cycle: int = 0) -> None:
        """Begin a state, unless it is the present one."""
        if self._state == (name, cycle):
            return
        self._state = (name, cycle)
        if self._timer is not None:
            self._timer.cancel()
        limits = self._limits
        seconds = {
            "idle": limits.idle_seconds,
            "head": limits.idle_seconds,
            "body": limits.body_seconds + _GRACE_SECONDS,
        }.get(name)
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._end, name)

    def _end(self, state: str) -> None:
        if self.transport.is_closing():
            return
        if state == "head":
            self._write_error(
                408, f"The request's head was not there after {self._limits.idle_seconds:g} seconds."
            )
        self.transport.close()

    def _write_error(self, status: int, message: str) -> None:
        """An answer to what no route will see."""
        request_id = f"req_{uuid.uuid4().hex}"
        content = json.dumps(error_content(status, message, request_id)).encode()
        head = (
            f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
