"""The finetuning API's answers: any trainer can give them, for all state is in the stores. Knows no executor's orders."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from nats.js.errors import ObjectNotFoundError

from common import subjects
from common.files import file_object
from common.messages import (
    CheckpointPage,
    CloseJob,
    CreateJob,
    EventPage,
    FineTuningJob,
    JobPage,
    JobQuery,
)
from services.trainer import events, jobs, naming
from services.trainer.jobs import JobRecord
from services.trainer.spec import ApiError, parse_create
from services.trainer.surroundings import Surroundings

Q = TypeVar("Q")
MAX_PAGE = 100
PURPOSE = "fine-tune"
"""Of the files that jobs read."""


class Endpoints:
    """Handlers of `finetune.<verb>`; they raise ApiError, which `answering` turns into the reply."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around

    async def subscribe(self) -> None:
        """Answer, together with all other trainers."""
        await self._subscribe("create", CreateJob, self.create)
        for verb in ("get", "list", "cancel", "pause", "resume", "events", "checkpoints"):
            await self._subscribe(verb, JobQuery, getattr(self, verb))

    async def create(self, message: CreateJob) -> FineTuningJob:
        """Check the body, the model and the file; then the job exists."""
        spec = parse_create(message.body, secrets.randbelow(2**31))
        self._require_served(spec.model)
        await self._require_file(spec.training_file, "training_file")
        if spec.validation_file is not None:
            await self._require_file(spec.validation_file, "validation_file")
        record = jobs.new_record(naming.new_job_id(time.time()), spec, time.time())
        await self._say(record, f"Created finetuning job: {record.job.id}")
        await self._around.table.create(record)
        return record.job

    async def get(self, query: JobQuery) -> FineTuningJob:
        """One job."""
        return (await self._around.table.get(query.job_id)).job

    async def list(self, query: JobQuery) -> JobPage:
        """Jobs, newest first."""
        records, has_more = await self._around.table.page(query.after, _limit(query))
        return JobPage(data=tuple(record.job for record in records), has_more=has_more)

    async def cancel(self, query: JobQuery) -> FineTuningJob:
        """The job is cancelled now. Its owner will notice; should it be dead, the executor is told here."""
        record = await self._around.table.modify(query.job_id, lambda record: jobs.cancel(record, time.time()))
        await self._say(record, "The job was cancelled")
        if record.executor_id:
            order = CloseJob(job_id=record.job.id, lease=record.lease)
            await self._around.bus.publish(subjects.executor_slices(record.executor_id), order)
        self._around.bus.spawn(self._around.artifacts.sweep(record))
        return record.job

    async def pause(self, query: JobQuery) -> FineTuningJob:
        """A running job stays `running` until its owner has written a checkpoint."""
        record = await self._around.table.modify(query.job_id, jobs.pause)
        await self._say(record, "The job is asked to pause" if record.wish == "pause" else "The job was paused")
        return record.job

    async def resume(self, query: JobQuery) -> FineTuningJob:
        """A paused job queues again."""
        record = await self._around.table.modify(query.job_id, jobs.resume)
        await self._say(record, "The job was resumed")
        return record.job

    async def events(self, query: JobQuery) -> EventPage:
        """A job's events, newest first."""
        await self._around.table.get(query.job_id)
        before = naming.event_number(query.job_id, query.after) if query.after else None
        if query.after and before is None:
            raise ApiError(400, f"after: {query.after} is no event of job {query.job_id}", "invalid_value", "after")
        data, has_more = await self._around.events.page(query.job_id, before, _limit(query))
        return EventPage(data=tuple(data), has_more=has_more)

    async def checkpoints(self, query: JobQuery) -> CheckpointPage:
        """A job's checkpoints, newest first."""
        found = sorted((await self._around.table.get(query.job_id)).checkpoints, key=lambda c: c.step_number, reverse=True)
        if query.after:
            ids = [checkpoint.id for checkpoint in found]
            if query.after not in ids:
                raise ApiError(400, f"after: {query.after} is no checkpoint of this job", "invalid_value", "after")
            found = found[ids.index(query.after) + 1 :]
        limit = _limit(query)
        return CheckpointPage(data=tuple(found[:limit]), has_more=len(found) > limit)

    async def _subscribe(self, verb: str, kind: type[Q], handler: Callable[[Q], Awaitable[Any]]) -> None:
        subject = subjects.finetune(verb)
        await self._around.bus.subscribe(subject, kind, answering(handler), queue="trainer", concurrent=True)

    def _require_served(self, model: str) -> None:
        known = sorted({beat.executor.model for beat in self._around.executors() if beat.executor})
        if not known:
            raise ApiError(503, "no executor is alive; try again", "no_executor")
        if model in known:
            return
        raise ApiError(
            400, f"model {model} cannot be finetuned here; base models: {', '.join(known)}", "model_not_found", "model"
        )

    async def _require_file(self, file_id: str, param: str) -> None:
        store = await self._around.bus.object_store(subjects.FILES_STORE)
        try:
            purpose = file_object(await store.get_info(file_id))["purpose"]
        except ObjectNotFoundError as error:
            raise ApiError(400, f"no such file: {file_id}", "file_not_found", param) from error
        if purpose != PURPOSE:
            problem = f"{param}: {file_id} has the purpose {purpose}; jobs read files of the purpose {PURPOSE}"
            raise ApiError(400, problem, "invalid_file_purpose", param)

    async def _say(self, record: JobRecord, text: str) -> None:
        await self._around.events.append(record.job.id, events.message(time.time(), text))


def answering(handler: Callable[[Q], Awaitable[Any]]) -> Callable[[Q], Awaitable[Any]]:
    """The handler with its ApiErrors as replies."""

    async def answer(message: Q) -> Any:
        try:
            return await handler(message)
        except ApiError as error:
            return error.reply

    return answer


def _limit(query: JobQuery) -> int:
    if not 1 <= query.limit <= MAX_PAGE:
        raise ApiError(400, f"limit: must be 1 to {MAX_PAGE}", "invalid_value", "limit")
    return query.limit
