"""Adapters that the fleet knows, loaded into this executor as they appear. Knows the bus's buckets, not requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from nats.js.errors import NotFoundError
from nats.js.kv import KV_DEL, KV_PURGE

from common import subjects
from common.bus import Bus
from common.codec import MalformedMessageError, decode
from common.messages import AdapterRecord
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder

log = structlog.get_logger()

OnLoad = Callable[[str, LoraAdapter | None], None]


class AdapterStore:
    """Follows the KV bucket `heddle_adapters`; `on_load(name, adapter)` is called for each change, None for a deletion."""

    def __init__(self, bus: Bus, decoder: Decoder, base_model: str, on_load: OnLoad) -> None:
        self._bus = bus
        self._decoder = decoder
        self._base_model = base_model
        self._on_load = on_load
        self.loaded = asyncio.Event()
        self._names: dict[str, str] = {}

    async def follow(self) -> None:
        """Load and drop adapters as records come and go, for ever; `loaded` is set when those of the start are there."""
        bucket = await self._bus.key_value(subjects.ADAPTERS_BUCKET)
        async for entry in await bucket.watchall():
            if entry is None:
                self.loaded.set()
            else:
                deleted = entry.operation in (KV_DEL, KV_PURGE)
                await self._apply(entry.key, None if deleted else entry.value)

    async def _apply(self, key: str, value: bytes | None) -> None:
        if value is None:
            if name := self._names.pop(key, None):
                self._on_load(name, None)
            return
        try:
            record = decode(value, AdapterRecord)
            if record.base_model != self._base_model or key in self._names:
                return
            data = (await (await self._bus.object_store(subjects.ARTIFACTS_STORE)).get(record.artifact)).data or b""
            adapter = LoraAdapter.from_safetensors(record.name, record.lora, data, self._decoder.config, self._decoder.device)
        except (MalformedMessageError, NotFoundError, ValueError) as error:
            log.error("adapter.unusable", key=key, error=str(error))
            return
        self._names[key] = record.name
        self._on_load(record.name, adapter)
        log.info("adapter.loaded", adapter=record.name, rank=record.lora.rank)
