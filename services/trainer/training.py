"""A job's training over all its executors: choose one, drive, and on a loss go on elsewhere. Knows no other job."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import structlog

from common import subjects
from common.artifacts import read_object
from common.codec import encode
from common.files import file_meta
from common.messages import AdapterRecord, CloseJob, JobEvent, OpenJob, StepDone
from services.trainer import events, jobs, naming, results
from services.trainer.board import Board
from services.trainer.drafter import DrafterFile, drafter_files
from services.trainer.drive import Course, Drive
from services.trainer.evaluation import Evaluation
from services.trainer.jobs import JobRecord, SupersededError
from services.trainer.journal import Journal
from services.trainer.lease import Lease
from services.trainer.placement import choose_executor
from services.trainer.session import ExecutorLostError, ExecutorSession, JobRejectedError, OverloadedError
from services.trainer.surroundings import Surroundings

log = structlog.get_logger()


class Training:
    """`step` is the number of steps done, `last` the newest that was told.

    With `handing_over` the job leaves its executor as for a pause.
    """

    def __init__(self, around: Surroundings, lease: Lease, journal: Journal, course: Course) -> None:
        self.step = lease.record.checkpoint_step
        self.handing_over = False
        self._around, self._config, self._lease, self._journal, self._course = around, around.config, lease, journal, course
        self.last: StepDone | None = None
        self._evaluation: tuple[int, Evaluation] | None = None
        self._board = Board(around.config.tensorboard_dir, lease.job_id, around.config.instance_id)
        self._best_step = self.step
        self._attempts = 0
        self._opened: tuple[float, int] | None = None
        self._set_aside_at: dict[str, float] = {}

    @property
    def stopping(self) -> bool:
        """Whether to leave the executor after the steps in flight."""
        return self.handing_over or self._lease.pause_wished

    async def run(self) -> Literal["finish", "stop"]:
        """Train until the final checkpoint exists, or until stopping. Raises JobRejectedError or SupersededError."""
        while not self._is_trained():
            executor_id = await self._choose()
            if executor_id is None:
                return "stop"
            record = await self._lease.change(functools.partial(jobs.placed, executor_id=executor_id))
            session = self._session(executor_id, record)
            try:
                return await self._on(session)
            except ExecutorLostError as error:
                await self._lost(session, str(error))
            except OverloadedError:
                self._set_aside(executor_id)
            finally:
                await session.end()
        return "finish"

    async def publish_adapter(self) -> str | None:
        """Make the trained adapter known to all executors; returns its model name. A drafter has none."""
        spec = self._course.spec
        if spec.drafter is not None:
            return None
        name = naming.model_name(spec.model, spec.suffix, self._lease.job_id)
        written_at = {listed.step_number: listed.created_at for listed in self._lease.record.checkpoints}
        await self._announce(name, self._final_artifact(), written_at.get(self._course.plan.total_steps, int(time.time())))
        return name

    async def store_results(self) -> tuple[str, ...]:
        """The metrics of all steps, and a drafter's folder, as files; returns their ids."""
        around, job_id, now = self._around, self._lease.job_id, time.time()
        metrics = await around.events.metrics(job_id)
        store = await around.bus.object_store(subjects.FILES_STORE)
        made = [
            ("csv", "step_metrics.csv", results.step_table(metrics)),
            ("tfevents", f"events.out.tfevents.{int(now)}.{job_id}", results.event_file(metrics)),
            *await self._drafter_files(metrics),
        ]
        ids = []
        for kind, filename, data in made:
            ids.append(naming.result_file_id(job_id, kind))
            await store.put(ids[-1], data, file_meta(ids[-1], filename, "fine-tune-results", now))
        return tuple(ids)

    async def _drafter_files(self, metrics: list[JobEvent]) -> list[DrafterFile]:
        course = self._course
        if course.drafter is None:
            return []
        store = await self._around.bus.object_store(subjects.ARTIFACTS_STORE)
        weights = await read_object(store, self._final_artifact(), self._config.open_timeout_s)
        return drafter_files(weights, course.spec, course.dataset, metrics)

    async def withdraw(self, name: str | None, files: tuple[str, ...]) -> None:
        """The job was cancelled at the last moment: its adapter is not to be served, and its files go."""
        if name is not None:
            bucket = await self._around.bus.key_value(subjects.ADAPTERS_BUCKET)
            await bucket.delete(subjects.adapter_key(name))
        store = await self._around.bus.object_store(subjects.FILES_STORE)
        for file_id in files:
            await store.delete(file_id)

    def estimated_finish(self, now: float) -> int | None:
        """When the last step will be done at the pace since the executor was opened."""
        if self._opened is None or self.step <= self._opened[1]:
            return None
        opened_at, first = self._opened
        pace_s = (now - opened_at) / (self.step - first)
        return int(now + pace_s * (self._course.plan.total_steps - self.step))

    # --- what the drive asks -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises SupersededError when the job is not ours any more."""
        self._lease.check()

    async def step_done(self, done: StepDone) -> None:
        """Tell a step's metrics."""
        self.step, self.last = max(self.step, done.step + 1), done
        if self.step > self._best_step:
            self._best_step, self._attempts = self.step, 0
        self._around.counters["steps"] += 1
        self._around.counters["trained_tokens"] += done.num_sequence_tokens
        await self._write_metrics(done)

    async def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Tell the evaluation with the metrics of the step before it."""
        self._evaluation = (step, evaluation)
        if self.last is not None and self.last.step + 1 == step:
            await self._write_metrics(self.last, evaluation)
        else:
            await self._say(f"Validation loss before step {step + 1}: {evaluation.loss:.4f}", data=evaluation.metrics())

    async def _write_metrics(self, done: StepDone, evaluation: Evaluation | None = None) -> None:
        event = events.metrics(time.time(), done, self._course.update(done.step), self._course.plan.total_steps, evaluation)
        await self._journal.metrics(done.step, event)
        await asyncio.to_thread(self._board.step, event.data)

    async def checkpoint_written(self, artifact: str, step: int) -> None:
        """Remember a checkpoint. One that ends an epoch is told, and is a model, the last one the finished model. Any other,
        of a pause or a shutdown, is only resumed from.
        """
        epoch, rest = divmod(step, self._course.plan.steps_per_epoch)
        if rest:
            await self.saved(artifact, step)
            return
        metrics = events.step_metrics(self.last) if self.last and self.last.step + 1 == step else {}
        if self._evaluation is not None and self._evaluation[0] == step:
            metrics |= self._evaluation[1].metrics()
        spec = self._course.spec
        if spec.drafter is not None:  # no model that a user could ask for
            await self._record(lambda record: jobs.saved(record, artifact, step))
        else:
            await self._record(lambda record: jobs.checkpointed(record, artifact, step, metrics, time.time()))
            listed = self._lease.record.checkpoints[-1]
            await self._announce(listed.fine_tuned_model_checkpoint, artifact, listed.created_at)
        loss = f", full validation loss={metrics['full_valid_loss']:.4f}" if "full_valid_loss" in metrics else ""
        await self._say(f"Epoch {epoch}/{self._course.plan.n_epochs} completed{loss}", data={"epoch": epoch, **metrics})
        await self._say(f"Checkpoint created at step {step}", data={"artifact": artifact, "step": step})

    async def saved(self, artifact: str, step: int) -> None:
        """Remember where to resume."""
        await self._record(lambda record: jobs.saved(record, artifact, step))

    async def progress_lost(self, step: int) -> None:
        """What was done beyond the last message left no metrics."""
        if step > self.step:
            await self._say(f"The metrics of steps {self.step + 1} to {step} were lost", "warn")
        self.step = max(self.step, step)

    async def _announce(self, name: str, artifact: str, created_at: int) -> None:
        """Have executors serve what is in the artifact under this name. Said again in the same words, it changes nothing."""
        adapter = AdapterRecord(
            name=name,
            base_model=self._course.spec.model,
            artifact=artifact,
            lora=self._course.spec.lora,
            created_at=created_at,
            job_id=self._lease.job_id,
        )
        bucket = await self._around.bus.key_value(subjects.ADAPTERS_BUCKET)
        await bucket.put(subjects.adapter_key(name), encode(adapter))

    async def _record(self, change: Callable[[JobRecord], JobRecord]) -> None:
        """A new checkpoint is to resume from; the one before is then in nobody's way."""
        before = self._lease.record
        await self._around.artifacts.delete_superseded(before, await self._lease.change(change))

    # --- executors ---------------------------------------------------------------------------------------------------

    async def _on(self, session: ExecutorSession) -> Literal["finish", "stop"]:
        """Train on this executor and leave it; it keeps nothing, unless another trainer has the job there now."""
        try:
            step = await session.open()
            await self._begin(session, step)
            ending = await Drive(session, self._course, self, self._config).run(step, self._checkpointed(step))
        except JobRejectedError:
            await session.close()
            raise
        except SupersededError as error:
            if not error.record.owner:
                await session.close()
            raise
        await session.close()
        return ending

    def _checkpointed(self, step: int) -> int:
        """The newest step, up to this one, that an artifact of its own holds: it must not be written again."""
        record = self._lease.record
        steps = [c.step_number for c in record.checkpoints]
        if record.checkpoint == naming.artifact_name(self._lease.job_id, record.checkpoint_step):
            steps.append(record.checkpoint_step)
        return max((each for each in steps if each <= step), default=0)

    async def _begin(self, session: ExecutorSession, step: int) -> None:
        verb = f"continues after step {step}" if step else "starts over" if self._lease.record.has_begun else "started"
        await self._lease.change(lambda record: jobs.begun(record, step))
        await self._journal.rewind(step)
        await asyncio.to_thread(self._board.begin, step)
        await self.progress_lost(step)
        self.step, self._opened = step, (time.time(), step)
        await self._say(f"Training {verb} on executor {session.executor_id}", data={"executor_id": session.executor_id})

    async def _choose(self) -> str | None:
        """An executor for this job, as soon as there is one; None when stopping first."""
        told = False
        while True:
            self.check()
            if self.stopping:
                return None
            beats = [b for b in self._around.executors() if b.sent_at > self._set_aside_at.get(b.instance_id, 0.0)]
            prefer = self._lease.record.executor_id if self._attempts == 0 else ""
            chosen = choose_executor(beats, self._course.spec.model, self._course.longest, prefer)
            if chosen is not None:
                return chosen
            if not told:
                await self._say(f"Waiting for an executor that serves {self._course.spec.model}", "warn")
                told = True
            await self._lease.wait(self._config.heartbeat_s)

    async def _lost(self, session: ExecutorSession, reason: str) -> None:
        """Count the loss; should the executor live after all, it may forget the job."""
        self._attempts += 1
        self._set_aside(session.executor_id)
        await self._say(f"Lost executor {session.executor_id}: {reason}", "warn", {"executor_id": session.executor_id})
        if self._attempts >= self._config.max_attempts:
            raise JobRejectedError(f"no progress on executors in {self._attempts} attempts; the last: {reason}")
        order = CloseJob(job_id=self._lease.job_id, lease=session.order.lease)
        await self._around.bus.publish(subjects.executor_slices(session.executor_id), order)

    def _set_aside(self, executor_id: str) -> None:
        """Do not choose this executor again before its next beat."""
        beats = {beat.instance_id: beat.sent_at for beat in self._around.executors()}
        self._set_aside_at[executor_id] = beats.get(executor_id, 0.0)

    def _session(self, executor_id: str, record: JobRecord) -> ExecutorSession:
        order = OpenJob(
            job_id=record.job.id,
            lease=record.lease,
            base_model=record.spec.model,
            lora=record.spec.lora,
            drafter=self._course.drafter,
            seed=record.spec.seed,
            checkpoint=record.checkpoint,
        )
        around = self._around
        return ExecutorSession(around.bus, around.fleet, self._config, executor_id, order, self._lease.wake, self.check)

    def _final_artifact(self) -> str:
        return naming.artifact_name(self._lease.job_id, self._course.plan.total_steps)

    def _is_trained(self) -> bool:
        return self._lease.record.checkpoint == self._final_artifact()

    async def _say(self, text: str, level: events.Level = "info", data: Mapping[str, Any] | None = None) -> None:
        log.info("job.event", job_id=self._lease.job_id, text=text)
        await self._journal.write(events.message(time.time(), text, level, data))
