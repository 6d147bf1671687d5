"""Deletes what finetuning jobs stored and nobody needs any more. Knows no executor; failures are logged and change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import nats.errors
import structlog
from nats.js.errors import NotFoundError

from common import subjects
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
        await self._delete(sorted(jobs.needed_objects(before) - jobs.needed_objects(after)))

    async def sweep(self, record: JobRecord) -> None:
        """The job is over: delete all that it stored but what the record still needs."""
        try:
            async with asyncio.timeout(self._timeout_s):
                stored = await (await self._bus.object_store(subjects.ARTIFACTS_STORE)).list(ignore_deletes=True)
        except NotFoundError:  # the store is empty
            return
        except (nats.errors.Error, TimeoutError) as error:
            log.warning("job.not_swept", job_id=record.job.id, error=str(error) or type(error).__name__)
            return
        own = {info.name for info in stored if info.name and info.name.startswith(naming.artifact_prefix(record.job.id))}
        await self._delete(sorted(own - jobs.needed_objects(record)))

    async def _delete(self, names: Iterable[str]) -> None:
        store = await self._bus.object_store(subjects.ARTIFACTS_STORE)
        for name in names:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await store.delete(name)
            except NotFoundError:
                continue
            except (nats.errors.Error, TimeoutError) as error:
                log.warning("artifact.not_deleted", artifact=name, error=str(error) or type(error).__name__)
