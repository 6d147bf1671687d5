"""Adapters that the fleet knows, loaded into this executor as they appear. Knows the bus's buckets, not requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from nats.errors import Error as NatsError

from common import subjects
from common.artifacts import read_object
from common.bus import Bus
from common.messages import AdapterRecord
from common.records import follow_records
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder

log = structlog.get_logger()

READ_TIMEOUT_S = 60.0
OnLoad = Callable[[str, LoraAdapter | None], None]


class AdapterStore:
    """Follows the KV bucket `heddle_adapters`; `on_load(name, adapter)` is called for each change, None for a deletion."""

    def __init__(self, bus: Bus, decoder: Decoder, base_model: str, on_load: OnLoad) -> None:
        self.loaded = asyncio.Event()
        """Set when the adapters that were there at the start are loaded."""
        self._bus = bus
        self._decoder = decoder
        self._base_model = base_model
        self._on_load = on_load
        self._records: dict[str, AdapterRecord] = {}

    async def follow(self) -> None:
        """Load and drop adapters as records come and go, for ever."""
        await follow_records(self._bus, subjects.ADAPTERS_BUCKET, AdapterRecord, self._apply)

    async def _apply(self, records: dict[str, AdapterRecord]) -> None:
        wanted = {record.name: record for record in records.values() if record.base_model == self._base_model}
        for name in self._records.keys() - wanted.keys():
            del self._records[name]
            self._on_load(name, None)
        for name, record in wanted.items():
            if self._records.get(name) != record and await self._load(record):
                self._records[name] = record
        self.loaded.set()

    async def _load(self, record: AdapterRecord) -> bool:
        """Whether it worked; if not, the reason is logged, and it is tried again when the records are next read."""
        try:
            store = await self._bus.object_store(subjects.ARTIFACTS_STORE)
            data = await read_object(store, record.artifact, READ_TIMEOUT_S)
            adapter = LoraAdapter.from_safetensors(record.name, record.lora, data, self._decoder.config, self._decoder.device)
        except (NatsError, TimeoutError, ValueError, RuntimeError, MemoryError) as error:  # the last two: too large
            log.error("adapter.unusable", adapter=record.name, error=str(error) or type(error).__name__)
            return False
        self._on_load(record.name, adapter)
        log.info("adapter.loaded", adapter=record.name, rank=record.lora.rank)
        return True
