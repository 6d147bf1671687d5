"""One job in this trainer's hands: validated or trained, and every way in which that ends. Knows no other job."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

import nats.js.errors
import structlog

from common.messages import JobError, StepDone
from services.trainer import events, jobs
from services.trainer.dataset import NO_ANSWER, Dataset, DatasetError
from services.trainer.drafter import drafter_spec
from services.trainer.drive import Course
from services.trainer.jobs import JobRecord, SupersededError
from services.trainer.journal import Journal
from services.trainer.lease import Lease
from services.trainer.session import JobRejectedError
from services.trainer.surroundings import Surroundings
from services.trainer.training import Training

log = structlog.get_logger()

FileParam = Literal["training_file", "validation_file"]
HINT = "; to learn from the model's own answers to prompts, use `heddle distill`"
FILE_NAMES: dict[FileParam, str] = {"training_file": "Training file", "validation_file": "Validation file"}


class InvalidFileError(ValueError):
    """A file of the job cannot be used; `param` says which."""

    def __init__(self, param: FileParam, message: str) -> None:
        super().__init__(message)
        self.param = param


class JobRunner:
    """Works on a claimed job until it is over, handed over, or taken from us."""

    def __init__(self, around: Surroundings, record: JobRecord) -> None:
        self.lease = Lease(around.table, around.config, record)
        self.validates = jobs.is_new(record)
        self._around = around
        self._journal = Journal(around.events, record.job.id)
        self._training: Training | None = None
        self._handing_over = False

    @property
    def last_step(self) -> StepDone | None:
        """The newest step of the training, if there is one."""
        return self._training.last if self._training else None

    async def run(self) -> None:
        """Validate a new job, train any other. Raises nats errors when the server does not answer."""
        try:
            course = await self._course()
            if self.validates:
                await self._queue(course)
            else:
                await self._train(course)
        except InvalidFileError as error:
            await self._fail(JobError(code=f"invalid_{error.param}", message=str(error), param=error.param))
        except JobRejectedError as error:
            await self._fail(JobError(code="training_failed", message=str(error)))

    async def supervise(self) -> None:
        """Run, unless the job is or becomes somebody else's; what a job that is over leaves behind is deleted."""
        try:
            await self.run()
            record = self.lease.record
        except SupersededError as error:
            log.info("job.superseded", job_id=self.lease.job_id, now=str(error))
            record = error.record
        if record.job.status in jobs.FINAL:
            await self._around.artifacts.sweep(record)

    async def renew(self) -> None:
        """Prolong the lease and tell the progress; a lost lease is noticed by who works on the job."""
        training = self._training
        step = training.step if training else self.lease.record.job.step
        finish = training.estimated_finish(time.time()) if training else None
        try:
            await self.lease.renew(step, finish)
        except SupersededError as error:
            log.info("job.lease_lost", job_id=self.lease.job_id, now=str(error))

    def hand_over(self) -> None:
        """Leave the executor with a checkpoint, so that another trainer can go on."""
        self._handing_over = True
        if self._training is not None:
            self._training.handing_over = True
        self.lease.wake.set()

    async def release(self) -> None:
        """Give the job back to the table."""
        try:
            await self.lease.change(lambda r: jobs.released(r, "validating_files" if self.validates else "queued"))
        except SupersededError as error:
            log.info("job.superseded", job_id=self.lease.job_id, now=str(error))

    async def _course(self) -> Course:
        """All that the job trains on. Raises InvalidFileError."""
        spec = self.lease.record.spec
        dataset = await self._load(spec.training_file, "training_file")
        validation = await self._load(spec.validation_file, "validation_file") if spec.validation_file else None
        drafter = await asyncio.to_thread(drafter_spec, spec, dataset, self._around.tokenizer.vocab_size)
        return Course.of(self.lease.job_id, spec, dataset, validation, drafter)

    async def _load(self, file_id: str, param: FileParam) -> Dataset:
        """The sequences of one of the job's files; one that cannot be read now is tried again. Raises InvalidFileError."""
        config, model = self._around.config, self.lease.record.spec.model
        for number in range(1, config.max_file_reads + 1):
            try:
                return await self._around.load_dataset(file_id, model, validates=self.validates)
            except DatasetError as error:
                drafts = self.lease.record.spec.drafter is not None and NO_ANSWER in str(error)
                raise InvalidFileError(param, f"{error}{HINT if drafts else ''}") from error
            except (TimeoutError, nats.js.errors.Error) as error:
                reason = str(error) or type(error).__name__
            self.lease.check()
            text = f"{FILE_NAMES[param]} {file_id} could not be read (try {number} of {config.max_file_reads}): {reason}"
            await self._journal.write(events.message(time.time(), text, "warn"))
            if number < config.max_file_reads:
                await self.lease.pause(config.file_retry_s * 2 ** (number - 1))
        text = f"file {file_id} could not be read in {config.max_file_reads} tries; the last: {reason}"
        raise InvalidFileError(param, text)

    async def _queue(self, course: Course) -> None:
        total = course.plan.total_steps
        if course.validation is not None:
            counts = _counts(course.validation)
            text = "Validation file validated: {examples} examples, {tokens} tokens, {label_tokens} of them are labels"
            await self._journal.write(events.message(time.time(), text.format(**counts), data=counts))
        counts = _counts(course.dataset)
        text = "Training file validated: {examples} examples, {tokens} tokens per epoch, {label_tokens} of them are labels"
        data = {**counts, "total_steps": total}
        await self._journal.write(events.message(time.time(), text.format(**counts), data=data))
        if total <= course.spec.warmup_steps:
            text = f"warmup_steps={course.spec.warmup_steps}, but the job has {total} steps: it never reaches its learning rate"
            await self._journal.write(events.message(time.time(), text, "warn"))
        await self.lease.change(lambda record: jobs.with_job(jobs.released(record, "queued"), total_steps=total))

    async def _train(self, course: Course) -> None:
        self._training = Training(self._around, self.lease, self._journal, course)
        self._training.handing_over = self._handing_over
        ending = await self._training.run()
        if ending == "finish":
            await self._succeed(self._training, course.dataset.num_tokens * course.spec.n_epochs)
        elif self.lease.pause_wished:
            await self._journal.write(events.message(time.time(), f"Job paused before step {self._training.step + 1}"))
            await self.lease.change(lambda record: jobs.released(record, "paused"))
        else:
            await self.release()

    async def _succeed(self, training: Training, trained_tokens: int) -> None:
        model = await training.publish_adapter()
        what = f"fine-tuned model created: {model}" if model else "drafter created: its folder is among the result files"
        await self._journal.write(events.message(time.time(), f"New {what}"))
        try:
            files = await training.store_results()
            await self.lease.change(lambda record: jobs.succeeded(record, model, trained_tokens, files, time.time()))
        except SupersededError as error:
            if error.record.job.status == "cancelled":
                await training.withdraw(model, files)
            raise
        self._around.counters["jobs_succeeded"] += 1

    async def _fail(self, error: JobError) -> None:
        await self._journal.write(events.message(time.time(), f"Job failed: {error.message}", "error"))
        await self.lease.change(lambda record: jobs.failed(record, error, time.time()))
        self._around.counters["jobs_failed"] += 1


def _counts(dataset: Dataset) -> dict[str, int]:
    """Labels are the tokens that the loss is taken of; a job's `trained_tokens` are all tokens, times epochs."""
    return {
        "examples": len(dataset.sequences),
        "tokens": dataset.num_tokens,
        "label_tokens": dataset.num_loss_tokens,
        "longest": dataset.longest,
    }
