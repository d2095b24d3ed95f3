"""What surrounds every route: who may ask and how much, an id for every request, counting, and an answer in
OpenAI's form whatever fails.

Decisions are taken on what the client has sent, byte for byte: what a library makes of a host, a path or a
header may differ from what another one does.
"""

import hmac
import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lckv.serving.errors import FAILED, ApiError, error_response
from lckv.serving.limits import ServingLimits
from lckv.serving.metrics import ServerMetrics

logger = logging.getLogger(__name__)

_OPEN_PATHS = (b"/health", b"/metrics", b"/docs", b"/openapi.json")
"""Asked for without a key."""

_JSON = re.compile(rb"application/json\s*(;.*)?", re.IGNORECASE)


class Guard:
    """Plain ASGI, so that streams and disconnects pass through untouched."""

    def __init__(
        self, app: ASGIApp, limits: ServingLimits, metrics: ServerMetrics, api_key: str | None
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if api_key is None else api_key.encode("utf-8", "surrogateescape")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, noting)
        except Exception as error:
            if status is not None:
                raise
            if not isinstance(error, ApiError):
                logger.exception("request %s failed", request_id)
                error = ApiError(500, FAILED)
            await error_response(error, request_id)(scope, receive, noting)
        finally:
            self._metrics.count(getattr(scope.get("route"), "path", "other"), status or 500)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a request that no route shall see."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        path = scope.get("raw_path") or scope["path"].encode()
        if self._key is not None and path not in _OPEN_PATHS and not _has_key(headers, self._key):
            raise ApiError(
                401, "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.", close=True
            )
        if scope["method"] != "POST":
            return
        _check_length(headers, self._limits.max_body_bytes)
        types = _values(headers, b"content-type")
        if len(types) != 1 or _JSON.fullmatch(types[0]) is None:
            raise ApiError(415, "The header 'Content-Type: application/json' is needed.")


def _check_length(headers: list[tuple[bytes, bytes]], most: int) -> None:
    """Raises ApiError for a body that is too long by what is said of it, or of which nothing is said; those
    in chunks are counted when they are read."""
    lengths, codings = _values(headers, b"content-length"), _values(headers, b"transfer-encoding")
    if codings:
        if lengths or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise ApiError(
                400, "Transfer-Encoding must be chunked, and without Content-Length beside it.", close=True
            )
        return
    if len(lengths) != 1 or re.fullmatch(rb"[0-9]{1,18}", lengths[0]) is None:
        raise ApiError(411, "One header Content-Length is needed, or Transfer-Encoding: chunked.", close=True)
    if int(lengths[0]) > most:
        raise ApiError(413, f"The body may have at most {most} bytes.")


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _has_key(headers: list[tuple[bytes, bytes]], key: bytes) -> bool:
    given = _values(headers, b"authorization")
    if len(given) != 1:
        return False
    scheme, _, sent = given[0].partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(sent.strip(), key.strip())
