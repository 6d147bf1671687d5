"""What /docs shows: our request types as OpenAPI schemas. Knows types and FastAPI's OpenAPI hook, not routes."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from services.gateway.openai_api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadLoraAdapter,
    TokenizeRequest,
    UnloadLoraAdapter,
)

DESCRIPTION = """
One model, many latency targets: every request may carry its own SLO, as `slo: {tpot_ms, ttft_ms}` in the body or as the headers
`x-slo-tpot-ms` and `x-slo-ttft-ms`. Use it with any OpenAI client: set `base_url` to this server's `/v1`.
Finetuning jobs train on the same device, in the same iterations.
"""
_TEMPLATE = "#/components/schemas/{name}"
_BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, LoadLoraAdapter, UnloadLoraAdapter)


def body_of(kind: type) -> dict[str, Any]:
    """The route's `openapi_extra`: its body is of this type."""
    return {"requestBody": json_body({"$ref": _TEMPLATE.format(name=kind.__name__)})}


def json_body(schema: dict[str, Any]) -> dict[str, Any]:
    """A required JSON body."""
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def install(app: FastAPI) -> None:
    """Add the types of all bodies to the app's OpenAPI document."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        _, schemas = msgspec.json.schema_components(_BODIES, ref_template=_TEMPLATE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
