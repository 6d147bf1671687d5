"""The HTTP door: the FastAPI app, and uvicorn inside the service's own event loop. Knows sockets, not requests."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import uvicorn
from fastapi import APIRouter, FastAPI

from services.gateway import docs, http_errors
from services.gateway.config import GatewayConfig
from services.gateway.middleware import Guard

BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than the idle time of common clients, so that they close first and no request hits a closing connection."""


def build_app(config: GatewayConfig, routers: Sequence[APIRouter]) -> FastAPI:
    """The app with error objects, limits and documentation."""
    app = FastAPI(title="Heddle", summary="An LLM server with a latency target per request", version=version("heddle"))
    app.description = docs.DESCRIPTION
    for router in routers:
        app.include_router(router)
    http_errors.install(app)
    docs.install(app)
    app.add_middleware(
        Guard, api_key=config.api_key, max_body_bytes=config.max_body_bytes, max_file_bytes=config.max_file_bytes
    )
    return app


class HttpServer:
    """Listens from the start on; `url` names the port that was taken."""

    def __init__(self, config: GatewayConfig, app: FastAPI) -> None:
        self._socket = _listen(config.host, config.port, config.reuse_port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=config.max_header_bytes,
            )
        )

    async def run(self) -> None:
        """Serve until stop()."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Close idle connections; requests that still run have a second."""
        self._server.should_exit = True


def _listen(host: str, port: int, reuse_port: bool) -> socket.socket:
    """A listening socket. It names its protocol, without which asyncio leaves Nagle's algorithm on: 40 ms per response."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the service."""
        yield
