"""Errors in the form that OpenAI's clients understand, whatever raised them."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class ApiError(Exception):
    """Something that the client is told: an HTTP status, a sentence, and the field that it is about."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after


def error_content(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def install(app: FastAPI) -> None:
    """Make `app` answer all errors that way."""

    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> JSONResponse:
        headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return JSONResponse(error_content(error.status, error.message, error.param), error.status, headers)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            error_content(error.status_code, str(error.detail)), error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = _sentence(first, param)
        return JSONResponse(error_content(400, message, param), 400)


def _sentence(error: dict[str, Any], param: str | None) -> str:
    if error["type"] == "json_invalid":
        return f"The body is not valid JSON: {error.get('ctx', {}).get('error', error['msg'])}."
    if error["type"] == "extra_forbidden":
        return f"{param}: there is no such field."
    shown = repr(error.get("input"))
    return f"{param or 'body'}: {error['msg']} (given: {shown[:100]}{'...' if len(shown) > 100 else ''})."
