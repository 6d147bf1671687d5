"""Deletes what finetuning jobs stored and nobody needs any more. Knows no executor; failures are logged and change nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable

import nats.errors
import structlog
from nats.js.errors import NotFoundError
from nats.js.object_store import ObjectStore

from common import subjects
from common.adapters import adapter_records
from common.bus import Bus
from services.trainer import jobs, naming
from services.trainer.jobs import JobRecord

log = structlog.get_logger()


class Artifacts:
    """The jobs' objects in the artifact store."""

    def __init__(self, bus: Bus, timeout_s: float) -> None:
        self._bus, self._timeout_s = bus, timeout_s

    async def delete_superseded(self, before: JobRecord, after: JobRecord) -> None:
        """The job's record changed so: delete what only the old one needs."""
        if names := jobs.needed_objects(before) - jobs.needed_objects(after):
            await self._try(after, lambda store: _delete(store, names))

    async def sweep(self, record: JobRecord) -> None:
        """The job is over: delete all that it stored but what the record still needs, and no longer serve what is deleted."""

        async def work(store: ObjectStore) -> None:
            await self._withdraw(record)
            await _sweep(store, record)

        await self._try(record, work)

    async def _withdraw(self, record: JobRecord) -> None:
        needed = jobs.needed_objects(record)
        bucket = await self._bus.key_value(subjects.ADAPTERS_BUCKET)
        for name, adapter in (await adapter_records(self._bus)).items():
            if adapter.job_id == record.job.id and adapter.artifact not in needed:
                await bucket.delete(subjects.adapter_key(name))

    async def _try(self, record: JobRecord, work: Callable[[ObjectStore], Awaitable[None]]) -> None:
        """What fails here is only kept in vain; the sweep at the job's end tries again."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await work(await self._bus.object_store(subjects.ARTIFACTS_STORE))
        except (nats.errors.Error, TimeoutError) as error:
            log.warning("artifacts.not_deleted", job_id=record.job.id, error=str(error) or type(error).__name__)


async def _sweep(store: ObjectStore, record: JobRecord) -> None:
    try:
        stored = await store.list(ignore_deletes=True)
    except NotFoundError:  # the store is empty
        return
    own = {info.name for info in stored if info.name and info.name.startswith(naming.artifact_prefix(record.job.id))}
    await _delete(store, own - jobs.needed_objects(record))


async def _delete(store: ObjectStore, names: Iterable[str]) -> None:
    for name in sorted(names):
        with contextlib.suppress(NotFoundError):  # somebody else did
            await store.delete(name)
