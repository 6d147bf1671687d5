"""Adapters that the fleet knows, loaded into this executor when they are asked for. Knows the bus's buckets, not requests."""

from __future__ import annotations

import asyncio

import structlog
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from common import subjects
from common.artifacts import read_object
from common.bus import Bus
from common.codec import MalformedMessageError, decode
from common.messages import AdapterChecked, AdapterRecord, CheckAdapter, Rejected
from common.records import follow_records
from services.executor.adapter_slots import AdapterSlots
from services.executor.adapter_spec import InvalidAdapterError, check_rank
from services.executor.inbox import Inbox
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder
from services.executor.startup import OnDevice

log = structlog.get_logger()

READ_TIMEOUT_S = 60.0
LOAD_WAIT_S = 2.5
"""How long a request waits for its adapter. Admission's patience with executors must be longer."""
MAX_SLOT_SHARE = 0.8
"""Of that time, what may pass until a slot is free."""
SLOT_CHECK_S = 0.01


class AdapterStore:
    """Follows the KV bucket `heddle_adapters`. Free slots are filled with the newest adapters, others are loaded on demand."""

    def __init__(
        self,
        bus: Bus,
        decoder: Decoder,
        base_model: str,
        *,
        resident: dict[str, LoraAdapter],
        slots: AdapterSlots,
        max_lora_rank: int,
        inbox: Inbox,
        on_device: OnDevice,
    ) -> None:
        self._bus, self._decoder, self._base_model = bus, decoder, base_model
        self._resident, self._slots, self._max_lora_rank = resident, slots, max_lora_rank
        self._inbox, self._on_device = inbox, on_device
        self._records: dict[str, AdapterRecord] = {}
        self._loading: dict[str, asyncio.Task[Rejected | None]] = {}
        self._changed = asyncio.Event()

    async def follow(self) -> None:
        """Drop adapters whose records go or change, and load those that are new, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fill())
            await follow_records(self._bus, subjects.ADAPTERS_BUCKET, AdapterRecord, self._apply)

    async def obtain(self, name: str) -> Rejected | None:
        """Make the adapter resident, or say why it is not."""
        record = self._records.get(name) or await self._look_up(name)
        if record is None or record.base_model != self._base_model:
            return Rejected(reason="unknown_model", message=f"there is no adapter {name} of {self._base_model}")
        task = self._start(record)
        done, _ = await asyncio.wait({task}, timeout=LOAD_WAIT_S)
        if not done:
            return Rejected(reason="overloaded", message=f"adapter {name} is still being loaded", retry_after_ms=500)
        return task.result()

    async def on_check(self, message: CheckAdapter) -> AdapterChecked | Rejected:
        """Whether an adapter that is not announced yet could be served here."""
        found = await self._read(message.record)
        return found if isinstance(found, Rejected) else AdapterChecked(name=message.record.name)

    async def _apply(self, records: dict[str, AdapterRecord]) -> None:
        wanted = {record.name: record for record in records.values() if record.base_model == self._base_model}
        gone = [name for name, record in self._records.items() if wanted.get(name) != record]
        self._records = wanted
        if gone:
            await self._inbox.ask(lambda: [self._resident.pop(name, None) for name in gone])
        self._changed.set()

    async def _fill(self) -> None:
        """Load the newest adapters while slots are free, after each change of the records, which do not wait for it."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            for record in sorted(self._records.values(), key=lambda record: -record.created_at):
                if self._changed.is_set():
                    break
                if record.name not in self._resident:
                    if not await self._inbox.ask(self._has_free_slot):
                        break
                    await self._start(record)

    async def _look_up(self, name: str) -> AdapterRecord | None:
        """The record of an adapter that a gateway may have heard of earlier than we."""
        try:
            entry = await (await self._bus.key_value(subjects.ADAPTERS_BUCKET)).get(subjects.adapter_key(name))
            return decode(entry.value or b"", AdapterRecord)
        except (NatsError, MalformedMessageError):
            return None

    def _start(self, record: AdapterRecord) -> asyncio.Task[Rejected | None]:
        """The one task that loads this adapter."""
        task = self._loading.get(record.name)
        if task is None:
            task = self._loading[record.name] = asyncio.ensure_future(self._load(record))
            task.add_done_callback(lambda _: self._loading.pop(record.name, None))
        return task

    async def _load(self, record: AdapterRecord) -> Rejected | None:
        was_known = record.name in self._records  # else it was looked up before we were told of it
        give_up_at = asyncio.get_running_loop().time() + MAX_SLOT_SHARE * LOAD_WAIT_S
        while not await self._inbox.ask(self._slots.take):
            if asyncio.get_running_loop().time() > give_up_at:
                message = f"all {self._slots.num_slots} adapter slots (max_loras) are in use"
                return Rejected(reason="overloaded", message=message, retry_after_ms=1000)
            await asyncio.sleep(SLOT_CHECK_S)
        found: LoraAdapter | Rejected | None = None
        try:
            found = await self._read(record)
        finally:
            # Its record may have changed or gone meanwhile: then nobody may find it under this name.
            is_current = self._records.get(record.name, None if was_known else record) == record
            adapter = found if isinstance(found, LoraAdapter) and is_current else None
            self._inbox.post(lambda: self._slots.fill(record.name, adapter))
        await self._inbox.ask(lambda: None)
        if isinstance(found, Rejected):
            log.error("adapter.unusable", adapter=record.name, error=found.message)
            return found
        log.info("adapter.loaded", adapter=record.name, rank=record.lora.rank)
        return None

    async def _read(self, record: AdapterRecord) -> LoraAdapter | Rejected:
        """Its weights in the model's type, or why it cannot be served."""
        what = f"adapter {record.name}"
        try:
            check_rank(record.lora, self._max_lora_rank, f"{what}: ")
            store = await self._bus.object_store(subjects.ARTIFACTS_STORE)
            data = await read_object(store, record.artifact, READ_TIMEOUT_S)
            adapter: LoraAdapter = await self._on_device(lambda: self._parse(record, data))
            return adapter
        except NotFoundError:
            return Rejected(reason="invalid", message=f"{what}: its weights ({record.artifact}) are not in the object store")
        except InvalidAdapterError as error:
            return Rejected(reason="invalid", message=str(error))
        except (NatsError, TimeoutError) as error:
            message = f"{what} could not be read: {str(error) or type(error).__name__}"
            return Rejected(reason="overloaded", message=message, retry_after_ms=1000)
        except (RuntimeError, MemoryError) as error:  # torch reports a lack of memory as RuntimeError
            message = f"{what} does not fit: {str(error) or type(error).__name__}"
            return Rejected(reason="overloaded", message=message, retry_after_ms=5000)

    def _parse(self, record: AdapterRecord, data: bytes) -> LoraAdapter:
        config, dtype = self._decoder.config, self._decoder.dtype
        return LoraAdapter.from_safetensors(record.name, record.lora, data, config, self._decoder.device, dtype)

    def _has_free_slot(self) -> bool:
        return self._slots.num_free > 0
