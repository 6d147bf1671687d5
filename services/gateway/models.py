"""The models a client may name: the base model and its adapters, and who serves them now. Knows loads, not requests."""

from __future__ import annotations

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
    """A model that at least one ready executor runs; its longest context."""

    name: str
    max_model_len: int


class Catalog:
    """Base model, adapters by name, and the fleet that serves them. `now` is the fleet's clock."""

    def __init__(self, base: str, root: str, fleet: Fleet) -> None:
        self.base = base
        self._root = root
        self._fleet = fleet
        self._adapters: dict[str, AdapterRecord] = {}
        self._started_at = int(time.time())

    def find(self, name: str | None, now: float) -> ServedModel:
        """The base model for None. Raises ApiError: 404 for an unknown name, 503 when no ready executor serves it."""
        name = name or self.base
        loads = self._loads(now)
        serving = [load for load in loads if name == self.base or name in load.adapters]
        if serving:
            return ServedModel(name, max(load.max_model_len for load in serving))
        if name == self.base:
            raise unavailable(f"No executor serves {name!r} at the moment.", "no_executor")
        if name in self._adapters:
            raise unavailable(f"No executor has loaded {name!r} yet.", "adapter_not_loaded")
        raise model_not_found(name)

    def is_served(self, now: float) -> bool:
        """Whether the base model has a ready executor."""
        return bool(self._loads(now))

    def max_model_len(self, now: float) -> int | None:
        """The longest context that a ready executor offers."""
        return max((load.max_model_len for load in self._loads(now)), default=None)

    def replace(self, adapters: dict[str, AdapterRecord]) -> None:
        """The adapters known from now on, by name."""
        self._adapters = adapters

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
        catalog.replace({record.name: record for record in records.values()})

    await follow_records(bus, subjects.ADAPTERS_BUCKET, AdapterRecord, replace)


def _card(name: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "heddle", "root": root, "parent": parent}
