"""Our hold on one job: changes to its record while it is ours, and the news that it is not. Knows no executor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from common.cancellation import raise_if_cancelled
from services.trainer import jobs
from services.trainer.config import TrainerConfig
from services.trainer.job_table import JobTable
from services.trainer.jobs import JobRecord, SupersededError


class Lease:
    """A claimed job. `record` is what we last wrote; `wake` is set when something that concerns the job may have changed."""

    def __init__(self, table: JobTable, config: TrainerConfig, record: JobRecord) -> None:
        self.record = record
        self.wake = asyncio.Event()
        self.pause_wished = record.wish == "pause"
        self._table, self._config = table, config
        self._superseded: JobRecord | None = None
        self._writing = asyncio.Lock()

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.record.job.id

    def check(self) -> None:
        """Raises SupersededError when the job is not ours any more, CancelledError when we are to end."""
        raise_if_cancelled()
        if self._superseded is not None:
            raise SupersededError(self._superseded)

    def observe(self, record: JobRecord) -> None:
        """The table shows this record, which may be older than ours."""
        if record.lease < self.record.lease:
            return
        if record.owner != self._config.instance_id or record.job.status not in jobs.OPEN:
            self._superseded = record
        self.pause_wished = record.wish == "pause"
        self.wake.set()

    async def pause(self, timeout_s: float) -> None:
        """Do nothing for so long; raises like `check` as soon as the job is not ours any more."""
        deadline = time.monotonic() + timeout_s
        while (rest := deadline - time.monotonic()) > 0:
            await self.wait(rest)
            self.check()

    async def wait(self, timeout_s: float) -> None:
        """Until something changes, at most so long."""
        self.wake.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self.wake.wait()
        except TimeoutError:
            pass

    async def change(self, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Change the record, if it is still ours, and return it. Raises SupersededError."""

        def while_held(record: JobRecord) -> JobRecord:
            jobs.require_held(record, self._config.instance_id, self.record.lease)
            return change(record)

        async with self._writing:
            try:
                self.record = await self._table.modify(self.job_id, while_held)
            except SupersededError as error:
                self._superseded = error.record
                self.wake.set()
                raise
        return self.record

    async def renew(self, step: int, estimated_finish: int | None) -> None:
        """Prolong the lease and tell the progress. Raises SupersededError."""
        now = time.time()
        await self.change(lambda record: jobs.renewed(record, now, self._config.lease_s, step, estimated_finish))
