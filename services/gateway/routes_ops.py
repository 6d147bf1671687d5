"""Models, health, version, metrics and status. Knows what the fleet says, not requests."""

from __future__ import annotations

import time
from importlib.metadata import version

from fastapi import APIRouter
from starlette.responses import Response

from common.fleet import Fleet
from services.gateway.core import Core
from services.gateway.http_errors import json_response
from services.gateway.status import status


def ops_routes(core: Core, fleet: Fleet, nats_url: str) -> APIRouter:
    """The routes that look at the system. `nats_url` has no credentials."""
    router = APIRouter()

    @router.get("/v1/models", summary="Base model and adapters", tags=["Models"])
    async def models() -> Response:
        """The base model first, then the adapters, whose `parent` it is."""
        return json_response({"object": "list", "data": core.catalog.cards(time.monotonic())})

    @router.get("/v1/models/{model:path}", summary="One model", tags=["Models"])
    async def model(model: str) -> Response:
        """404 for a model that is not listed."""
        return json_response(core.catalog.card(model, time.monotonic()))

    @router.get("/health", summary="Ready to serve?", tags=["Operations"])
    async def health() -> Response:
        """200 when an executor is ready and this gateway is not shutting down, else 503 with the reason."""
        if core.is_draining:
            return json_response({"status": "draining", "reason": "This gateway is shutting down."}, 503)
        if not core.catalog.is_served(time.monotonic()):
            return json_response({"status": "unavailable", "reason": f"No executor serves {core.catalog.base!r}."}, 503)
        return json_response({"status": "ok"})

    @router.get("/live", summary="Is this process alive?", tags=["Operations"])
    @router.get("/ping", include_in_schema=False)
    async def live() -> Response:
        """Always 200."""
        return json_response({"status": "ok"})

    @router.get("/version", summary="Heddle's version", tags=["Operations"])
    async def show_version() -> Response:
        """As installed."""
        return json_response({"version": version("heddle")})

    @router.get("/metrics", summary="Prometheus metrics", tags=["Operations"])
    async def metrics() -> Response:
        """vLLM's names for what vLLM has too, `heddle_` for the rest."""
        return Response(core.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/status", summary="All services", tags=["Operations"])
    async def show_status() -> Response:
        """Every living service with name, id, state and load."""
        return json_response(status(nats_url, core.catalog.base, fleet.alive(None, time.monotonic())))

    return router
