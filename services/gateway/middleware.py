"""What happens to every HTTP request: id, key and size limit. Knows ASGI and headers, not routes' meanings."""

from __future__ import annotations

import hmac
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import ApiError
from services.gateway.http_errors import error_response

OPEN_PATHS = frozenset({"/health", "/live", "/ping", "/version"})
FILES_PATH = "/v1/files"
MULTIPART_OVERHEAD_BYTES = 64 * 1024
DISCARD_FACTOR = 8
"""A body so many times too large is still read to its end before the refusal, else the client sees a broken connection."""
MAX_REQUEST_ID_CHARS = 128


class Guard:
    """Gives each request an id, checks the API key and limits the body."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, max_file_bytes: int) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_file_bytes + MULTIPART_OVERHEAD_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")[:MAX_REQUEST_ID_CHARS] or uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        limit = self._max_upload_bytes if scope["path"] == FILES_PATH else self._max_body_bytes
        refusal = await self._refusal(scope["path"], headers, receive, limit)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
        else:
            await self._app(scope, _limited(receive, limit), send_with_id)

    async def _refusal(self, path: str, headers: Headers, receive: Receive, limit: int) -> Response | None:
        given = headers.get("authorization", "").encode("latin-1")
        if self._expected is not None and path not in OPEN_PATHS and not hmac.compare_digest(given, self._expected):
            return error_response(ApiError(401, "A valid API key is needed.", code="invalid_api_key"))
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            await _discard(receive, DISCARD_FACTOR * limit)
            return error_response(_too_large(limit))
        return None


def _limited(receive: Receive, limit: int) -> Receive:
    """The same body, but reading more than the limit raises ApiError 413."""
    num_bytes = 0

    async def receive_limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        if message["type"] == "http.request":
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise _too_large(limit)
        return message

    return receive_limited


async def _discard(receive: Receive, limit: int) -> None:
    num_bytes = 0
    while num_bytes < limit:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")
