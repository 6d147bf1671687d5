"""Which jobs this trainer works on: follows the table, claims, renews, and lets go at the end. Knows no step of a job."""

from __future__ import annotations

import asyncio
import contextlib
import time

import nats.errors
import structlog

from common.bus import BusError
from common.cancellation import raise_if_cancelled
from common.messages import StepDone
from services.trainer import jobs
from services.trainer.jobs import JobRecord, SupersededError
from services.trainer.runner import JobRunner
from services.trainer.spec import ApiError
from services.trainer.surroundings import Surroundings

log = structlog.get_logger()


class Dispatcher:
    """The jobs in this trainer's hands, and those that wait in the table."""

    def __init__(self, around: Surroundings, tasks: asyncio.TaskGroup) -> None:
        self._around, self._config = around, around.config
        self._tasks = tasks
        self._open: dict[str, JobRecord] = {}
        self._running: dict[str, tuple[JobRunner, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        self._draining = False

    @property
    def num_running(self) -> int:
        """Jobs that this trainer trains, or has an executor search for."""
        return sum(not runner.validates for runner, _ in self._running.values())

    @property
    def num_queued(self) -> int:
        """Jobs in the table that nobody works on yet."""
        return sum(not record.owner for record in self._open.values())

    @property
    def last_steps(self) -> list[StepDone]:
        """The newest step of each job that trains here."""
        return [step for runner, _ in self._running.values() if (step := runner.last_step) is not None]

    def start(self) -> None:
        """Work until drained."""
        for loop in (self._follow, self._claim_all, self._renew_all):
            self._tasks.create_task(loop())

    async def drain(self) -> None:
        """Claim no more; running jobs write a checkpoint if there is time, then go back to the table."""
        self._draining = True
        for runner, _ in self._running.values():
            runner.hand_over()
        running = list(self._running.values())
        if running:
            await asyncio.wait([task for _, task in running], timeout=self._config.drain_s)
        for runner, task in running:
            if not task.done():
                task.cancel()
                with contextlib.suppress(nats.errors.Error):  # then the lease runs out by itself
                    await runner.release()

    async def _follow(self) -> None:
        """Keep our picture of the table; a new watch now and then, because a server may lose one without a word."""
        while True:
            raise_if_cancelled()
            try:
                async with asyncio.timeout(self._config.resync_s), contextlib.aclosing(self._around.table.watch()) as records:
                    async for record in records:
                        self._see(record)
            except TimeoutError:
                continue
            except nats.errors.Error as error:
                log.warning("jobs.watch_failed", error=str(error))
                await asyncio.sleep(self._config.heartbeat_s)

    def _see(self, record: JobRecord) -> None:
        if record.job.status in jobs.OPEN:
            self._open[record.job.id] = record
        else:
            self._open.pop(record.job.id, None)
        if record.job.id in self._running:
            self._running[record.job.id][0].lease.observe(record)
        self._changed.set()

    async def _claim_all(self) -> None:
        """Claim when the table changes, a job of ours ends, or time may have ended somebody's lease."""
        while not self._draining:
            raise_if_cancelled()
            self._changed.clear()
            free_slots = self._config.max_concurrent_jobs - self.num_running
            records, now = self._open.values(), time.time()
            for job_id in jobs.choose_claims(records, self._config.instance_id, self._running, free_slots, now):
                if job_id in self._open:  # nobody ended it while we claimed another
                    await self._claim(job_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.renew_s):
                    await self._changed.wait()

    async def _claim(self, job_id: str) -> None:
        """At most one trainer's compare-and-set succeeds."""
        config, now, validates = self._config, time.time(), jobs.is_new(self._open[job_id])
        try:
            record = await self._around.table.modify(
                job_id, lambda record: jobs.claim(record, config.instance_id, now, config.lease_s, validates=validates)
            )
        except SupersededError as error:
            self._see(error.record)
            return
        except ApiError:
            self._open.pop(job_id, None)
            return
        except nats.errors.Error as error:
            log.warning("job.not_claimed", job_id=job_id, error=str(error))
            return
        raise_if_cancelled()
        log.info("job.claimed", job_id=job_id, status=record.job.status, lease=record.lease)
        runner = JobRunner(self._around, record)
        self._running[job_id] = (runner, self._tasks.create_task(self._run(runner)))

    async def _run(self, runner: JobRunner) -> None:
        """Without the server a job cannot go on; it is ours to claim again."""
        try:
            await runner.supervise()
        except (nats.errors.Error, BusError, TimeoutError, ApiError) as error:
            log.warning("job.interrupted", job_id=runner.lease.job_id, error=str(error) or type(error).__name__)
            await asyncio.sleep(self._config.heartbeat_s)
        finally:
            del self._running[runner.lease.job_id]
            self._changed.set()

    async def _renew_all(self) -> None:
        while True:
            raise_if_cancelled()
            await asyncio.sleep(self._config.renew_s)
            for runner, _ in list(self._running.values()):
                try:
                    await runner.renew()
                except nats.errors.Error as error:
                    log.warning("job.not_renewed", job_id=runner.lease.job_id, error=str(error))
