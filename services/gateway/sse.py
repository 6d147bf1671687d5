"""Server-sent events, and work that stops when its client leaves. Knows ASGI, not what the events mean."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
SendEvent = Callable[[bytes], Awaitable[None]]

DONE = b"data: [DONE]\n\n"


class ClientLeftError(Exception):
    """The client closed the connection."""


def event(value: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work. When the client disconnects first the work is cancelled: ClientLeftError.

    The request's body must have been read before.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))


class EventStream(Response):
    """A response whose events come from `produce(send_event)`; it is cancelled when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, produce: Callable[[SendEvent], Coroutine[Any, Any, None]], on_end: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self._produce = produce
        self._on_end = on_end
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_event(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_client_leaves(receive, self._produce(send_event))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeftError:
            return
        finally:
            self._on_end()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
