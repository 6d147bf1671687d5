"""Every failure of an HTTP request as an OpenAI error object. Knows Starlette's exceptions, not their causes."""

from __future__ import annotations

from typing import Any

import msgspec
import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from nats.errors import Error as NatsError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from services.gateway.errors import ApiError, bad_request, unavailable
from services.gateway.sse import ClientLeftError

log = structlog.get_logger()

CLIENT_CLOSED_REQUEST = 499


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON body."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """The error's status, headers and body."""
    return json_response(error.body, error.status, error.headers)


def install(app: FastAPI) -> None:
    """Have the app answer all failures with error objects."""
    app.exception_handler(ApiError)(_on_api_error)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(ClientLeftError)(_on_client_left)
    app.exception_handler(ClientDisconnect)(_on_client_left)
    app.exception_handler(NatsError)(_on_nats_error)
    app.exception_handler(Exception)(_on_failure)


async def _on_api_error(_: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = {
        404: f"There is no route {request.url.path}.",
        405: f"{request.method} is not allowed on {request.url.path}.",
    }.get(error.status_code, str(error.detail))
    response = error_response(ApiError(error.status_code, message, code=codes.get(error.status_code)))
    response.headers.update(error.headers or {})
    return response


async def _on_validation_error(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return error_response(bad_request(f"Invalid request: {param}: {first['msg']}", param, "invalid_type"))


async def _on_client_left(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_nats_error(request: Request, error: NatsError) -> Response:
    log.warning("http.bus_failed", path=request.url.path, error=str(error) or type(error).__name__)
    return error_response(unavailable("The message bus did not answer.", "bus_unavailable"))


async def _on_failure(request: Request, error: Exception) -> Response:
    log.error("http.handler_failed", path=request.url.path, exc_info=error)
    return error_response(ApiError(500, "Internal error.", code="internal"))
