"""Errors in the form that OpenAI's clients understand, whatever raised them."""

import reprlib
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
FAILED = "The server failed on this request; its log has more under the request's id."

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 100


class ApiError(Exception):
    """Something that the client is told: an HTTP status, a sentence, and the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        """`code`: OpenAI's name for it. `close`: the connection is of no use any more."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        if close:
            self.headers["Connection"] = "close"
        if status == HTTPStatus.UNAUTHORIZED:
            self.headers["WWW-Authenticate"] = "Bearer"


def shown(value: Any) -> str:
    """A value in an error's message, shortened."""
    return _shortened.repr(value)


def error_content(
    status: int, message: str, request_id: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"message": message, "type": kind, "param": param, "code": code, "request_id": request_id}
    return {"error": content}


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    """The answer to a request."""
    content = error_content(error.status, error.message, request_id, error.param, error.code)
    return JSONResponse(content, error.status, error.headers)


def install(app: FastAPI) -> None:
    """Make `app` answer its own errors and those of its routes that way."""

    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        content = error_content(error.status_code, f"{error.detail}.", request.state.request_id)
        return JSONResponse(content, error.status_code, error.headers)
