"""The models a client may name: the base model and its adapters, and who serves them now. Knows loads, not requests."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from common import subjects
from common.bus import Bus
from common.fleet import Fleet
from common.messages import AdapterRecord, ExecutorLoad
from common.records import follow_records
from services.gateway.errors import model_not_found, unavailable


@dataclass(frozen=True)
class ServedModel:
    """A model that at least one ready executor runs; its longest context. `base_model` is set for adapters."""

    name: str
    max_model_len: int
    base_model: str = ""


class Catalog:
    """Base model, adapters by name, and the fleet that serves them. `now` is the fleet's clock."""

    def __init__(self, base: str, root: str, fleet: Fleet) -> None:
        self.base = base
        self._root = root
        self._fleet = fleet
        self._adapters: dict[str, AdapterRecord] = {}
        self._started_at = int(time.time())
        self.changed = asyncio.Condition()
        """Notified when the adapters known are others."""

    def find(self, name: str | None, now: float) -> ServedModel:
        """The base model for None. Raises ApiError: 404 for an unknown name, 503 when no executor is ready."""
        name = name or self.base
        loads = self._loads(now)
        if name != self.base and name not in self._adapters and not any(name in load.adapters for load in loads):
            raise model_not_found(name)
        if not loads:
            raise unavailable(f"No executor serves {self.base!r} at the moment.", "no_executor")
        base_model = "" if name == self.base else self.base
        return ServedModel(name, max(load.max_model_len for load in loads), base_model)

    def is_served(self, now: float) -> bool:
        """Whether the base model has a ready executor."""
        return bool(self._loads(now))

    def max_model_len(self, now: float) -> int | None:
        """The longest context that a ready executor offers."""
        return max((load.max_model_len for load in self._loads(now)), default=None)

    def replace(self, adapters: dict[str, AdapterRecord]) -> None:
        """The adapters known from now on, by name; those of other base models are not served here."""
        self._adapters = {name: record for name, record in adapters.items() if record.base_model == self.base}

    def has(self, name: str) -> bool:
        """Whether an adapter of this name is known."""
        return name in self._adapters

    def cards(self, now: float) -> list[dict[str, Any]]:
        """The model objects of GET /v1/models: the base model first."""
        base = _card(self.base, self._started_at, self._root, None) | {"max_model_len": self.max_model_len(now)}
        records = sorted(self._adapters.values(), key=lambda record: record.created_at)
        return [base] + [_card(r.name, int(r.created_at), r.artifact, self.base) for r in records]

    def card(self, name: str, now: float) -> dict[str, Any]:
        """One model object. Raises ApiError 404."""
        for card in self.cards(now):
            if card["id"] == name:
                return card
        raise model_not_found(name)

    def _loads(self, now: float) -> list[ExecutorLoad]:
        beats = self._fleet.alive("executor", now)
        return [beat.executor for beat in beats if beat.state == "ready" and beat.executor and beat.executor.model == self.base]


async def follow_adapters(bus: Bus, catalog: Catalog) -> None:
    """For ever: keep the catalog equal to the bucket of adapters."""

    async def replace(records: dict[str, AdapterRecord]) -> None:
        async with catalog.changed:
            catalog.replace({record.name: record for record in records.values()})
            catalog.changed.notify_all()

    await follow_records(bus, subjects.ADAPTERS_BUCKET, AdapterRecord, replace)


def _card(name: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "heddle", "root": root, "parent": parent}
