"""The body of GET /status: every service that is alive. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from common.messages import Beat

INTERNAL = ("latency", "cached_pages", "adapter_versions")
"""Of a load: long, and of use to admission only."""


def status(nats_url: str, model: str, beats: Sequence[Beat]) -> dict[str, Any]:
    """`nats_url` without credentials; one entry per instance, by role and id; an executor's load has `executor`."""
    return {"nats_url": nats_url, "model": model, "services": [_service(beat) for beat in beats]}


def _service(beat: Beat) -> dict[str, Any]:
    load: dict[str, Any] = beat.gauges | beat.counters
    if beat.executor is not None:
        load["executor"] = {name: value for name, value in msgspec.to_builtins(beat.executor).items() if name not in INTERNAL}
    return {"name": beat.role, "id": beat.instance_id, "state": beat.state, "url": beat.url, "load": load}
