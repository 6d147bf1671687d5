"""Every job's events in a JetStream KV bucket, one key per event, numbered without gaps. Knows no event's meaning."""

from __future__ import annotations

import msgspec
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from common import subjects
from common.bus import Bus
from common.codec import decode, encode
from common.messages import JobEvent
from services.trainer import naming


class EventLog:
    """Append, overwrite and page backwards. Several trainers may append to one job: a key is only created once."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> EventLog:
        """The log on this bus."""
        return cls(await bus.key_value(subjects.JOB_EVENTS_BUCKET))

    async def append(self, job_id: str, event: JobEvent, hint: int | None = None) -> int:
        """Store the event behind all others; returns its number. `hint` is a number below which all are taken."""
        number = await self.count(job_id) if hint is None else hint
        while True:
            try:
                await self._bucket.create(_key(job_id, number), _encoded(job_id, number, event))
            except KeyWrongLastSequenceError:
                number += 1
                continue
            return number

    async def overwrite(self, job_id: str, number: int, event: JobEvent) -> None:
        """Replace an event that was stored before."""
        await self._bucket.put(_key(job_id, number), _encoded(job_id, number, event))

    async def count(self, job_id: str) -> int:
        """How many events the job has: the first free number, found in O(log n) look-ups."""
        step, taken = 1, -1
        while await self.get(job_id, taken + step) is not None:
            taken, step = taken + step, step * 2
        while step > 1:
            step //= 2
            if await self.get(job_id, taken + step) is not None:
                taken += step
        return taken + 1

    async def get(self, job_id: str, number: int) -> JobEvent | None:
        """One event."""
        try:
            entry = await self._bucket.get(_key(job_id, number))
        except KeyNotFoundError:
            return None
        return decode(entry.value or b"", JobEvent)

    async def page(self, job_id: str, before: int | None, limit: int) -> tuple[list[JobEvent], bool]:
        """Up to `limit` events older than number `before` (None: the newest), newest first, and whether there are more."""
        end = await self.count(job_id) if before is None else before
        start = max(0, end - limit)
        found = [await self.get(job_id, number) for number in reversed(range(start, end))]
        return [event for event in found if event is not None], start > 0

    async def metrics(self, job_id: str) -> list[JobEvent]:
        """All metrics events, by step."""
        found = [event for number in range(await self.count(job_id)) if (event := await self.get(job_id, number))]
        return sorted((event for event in found if event.type == "metrics"), key=lambda event: int(event.data["step"]))


def _key(job_id: str, number: int) -> str:
    return f"{job_id}.{number}"


def _encoded(job_id: str, number: int, event: JobEvent) -> bytes:
    return encode(msgspec.structs.replace(event, id=naming.event_id(job_id, number)))
