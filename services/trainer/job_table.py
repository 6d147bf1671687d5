"""The table of jobs in a JetStream KV bucket: reads, and changes by compare-and-set. Knows no rule of a job's life."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import structlog
from nats.js.errors import InvalidKeyError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from common import subjects
from common.bus import Bus
from common.cancellation import raise_if_cancelled
from common.codec import MalformedMessageError, decode, encode
from services.trainer.jobs import JobRecord
from services.trainer.spec import ApiError

log = structlog.get_logger()


class JobTable:
    """All jobs, by id. Methods raise nats errors when the server does not answer."""

    def __init__(self, bus: Bus, bucket: KeyValue) -> None:
        self._bus = bus
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> JobTable:
        """The table on this bus."""
        return cls(bus, await bus.key_value(subjects.JOBS_BUCKET))

    async def create(self, record: JobRecord) -> None:
        """Add a job whose id is new."""
        await self._bucket.create(record.job.id, encode(record))

    async def get(self, job_id: str) -> JobRecord:
        """The job's record now. Raises ApiError 404."""
        return (await self._entry(job_id))[0]

    async def modify(self, job_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Replace the record by `change` of it, atomically: on a conflict `change` sees the newer record.

        What `change` raises leaves the record as it is.
        """
        while True:
            record, revision = await self._entry(job_id)
            changed = change(record)
            try:
                await self._bucket.update(job_id, encode(changed), last=revision)
            except KeyWrongLastSequenceError:
                continue
            return changed

    async def page(self, after: str, limit: int) -> tuple[list[JobRecord], bool]:
        """Up to `limit` jobs created before job `after` (empty: the newest), newest first, and whether there are more."""
        older = sorted((key for key in await self._ids() if not after or key < after), reverse=True)
        return [await self.get(key) for key in older[:limit]], len(older) > limit

    async def watch(self) -> AsyncGenerator[JobRecord, None]:
        """Every job's record, then every change."""
        watcher = await self._bucket.watchall(ignore_deletes=True)
        try:
            raise_if_cancelled()
            async for entry in watcher:
                if entry is None or not entry.value:
                    continue
                try:
                    yield decode(entry.value, JobRecord)
                except MalformedMessageError as error:
                    log.warning("jobs.malformed_record", job_id=entry.key, error=str(error))
        finally:
            await watcher.stop()  # type: ignore[no-untyped-call]

    async def _ids(self) -> list[str]:
        """All ids in one look; the client's own listing of keys can miss a key that changes meanwhile."""
        prefix = f"$KV.{subjects.JOBS_BUCKET}."
        info = await self._bus.js.stream_info(f"KV_{subjects.JOBS_BUCKET}", subjects_filter=f"{prefix}>")
        return [subject.removeprefix(prefix) for subject in info.state.subjects or {}]

    async def _entry(self, job_id: str) -> tuple[JobRecord, int]:
        try:
            entry = await self._bucket.get(job_id)
        except (KeyNotFoundError, InvalidKeyError) as error:
            raise ApiError(404, f"no such finetuning job: {job_id}", "fine_tune_not_found", "fine_tuning_job_id") from error
        return decode(entry.value or b"", JobRecord), entry.revision or 0
