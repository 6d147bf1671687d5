"""The inner loop of a job: steps to an executor, progress back, checkpoints now and then. Knows no job table."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol, TypeVar

from common.messages import DrafterSpec, OptimizerStep, SequenceEvaluated, StepDone, TrainingSlice
from services.trainer import naming
from services.trainer.config import TrainerConfig
from services.trainer.dataset import Dataset
from services.trainer.evaluation import Evaluation, Scores
from services.trainer.progress import Position, next_action
from services.trainer.schedule import StepPlan, make_evaluation, make_slices, optimizer_step, plan_steps
from services.trainer.session import ExecutorLostError, ExecutorSession, JobRejectedError, OverloadedError
from services.trainer.spec import JobSpec

T = TypeVar("T")
MAX_EVALUATIONS_IN_FLIGHT = 8
"""Sequences sent to be scored but not scored: enough to keep the executor busy."""


@dataclasses.dataclass(frozen=True)
class Course:
    """All that a job trains on, step by step."""

    job_id: str
    spec: JobSpec
    dataset: Dataset
    plan: StepPlan
    validation: Dataset | None = None
    drafter: DrafterSpec | None = None

    @classmethod
    def of(
        cls,
        job_id: str,
        spec: JobSpec,
        dataset: Dataset,
        validation: Dataset | None = None,
        drafter: DrafterSpec | None = None,
    ) -> Course:
        """The course of a job over a data set, with another one to be scored at each epoch's end."""
        return cls(job_id, spec, dataset, plan_steps(spec, len(dataset.sequences)), validation, drafter)

    @property
    def longest(self) -> int:
        """Length of the longest sequence of all."""
        return max(part.longest for part in (self.dataset, self.validation) if part is not None)

    def update(self, step: int) -> OptimizerStep:
        """The optimizer's step."""
        return optimizer_step(self.spec, step, self.plan.total_steps)

    def slices(self, step: int, lease: int) -> list[TrainingSlice]:
        """The sequences of a step."""
        batch = [self.dataset.sequences[index] for index in self.plan.batch(step)]
        return make_slices(self.job_id, lease, step, batch, self.update(step))


class Owner(Protocol):
    """Who drives: is told of progress, and says whether to go on."""

    @property
    def stopping(self) -> bool:
        """Whether the job should leave its executor after the steps in flight."""

    def check(self) -> None:
        """Raises when the job is not ours any more."""

    async def step_done(self, done: StepDone) -> None:
        """A step is done, perhaps not for the first time."""

    async def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """The validation file was scored before `step`."""

    async def checkpoint_written(self, artifact: str, step: int) -> None:
        """A checkpoint of its own name holds the state before `step`: an epoch's end, or where the owner wanted to stop."""

    async def saved(self, artifact: str, step: int) -> None:
        """So does this one, but only to resume from: the next will replace it."""

    async def progress_lost(self, step: int) -> None:
        """All steps before `step` are done, and what was not told of them by now never will be."""


class Drive:
    """One job on one executor, from the step at which it was opened."""

    def __init__(self, session: ExecutorSession, course: Course, owner: Owner, config: TrainerConfig) -> None:
        self._session, self._course, self._owner, self._config = session, course, owner, config
        self._position = Position(0, 0, 0)
        self._progressed_at = 0.0
        self._saved_at = 0.0
        self._saved = 0
        self._num_saves = 0
        self._told = 0
        self._scores: Scores | None = None

    async def run(self, step: int, checkpointed: int) -> Literal["finish", "stop"]:
        """Train from `step` to the end, or until the owner wants to stop; either way a checkpoint holds the last step.

        Raises ExecutorLostError, JobRejectedError, and what the owner's check raises.
        """
        self._position = Position(step, step, checkpointed)
        self._told = step
        self._progressed_at = self._saved_at = time.monotonic()
        self._saved = step
        while True:
            await self._absorb()
            match self._next():
                case "send" | "wait" if self._is_save_due():
                    await self._save()
                case "send":
                    await self._send_step(self._position.sent)
                case "wait":
                    await self._wait(self._config.heartbeat_s)
                    await self._probe_after_stall()
                case "checkpoint":
                    await self._evaluate()
                    await self._write_checkpoint()
                case ending:
                    return ending

    def _next(self) -> Literal["send", "wait", "checkpoint", "finish", "stop"]:
        self._owner.check()
        if not self._session.is_alive():
            raise ExecutorLostError(f"executor {self._session.executor_id} is gone")
        plan = self._course.plan
        return next_action(
            self._position, plan.steps_per_epoch, plan.total_steps, self._config.max_steps_in_flight, self._owner.stopping
        )

    async def _absorb(self) -> None:
        """Take in the progress that has arrived."""
        while self._session.inbox:
            progress = self._session.inbox.popleft()
            match progress:
                case StepDone():
                    await self._take_step(progress)
                case SequenceEvaluated():
                    self._progressed_at = time.monotonic()
                    if self._scores is not None:
                        self._scores.take(progress)
                case _:
                    raise JobRejectedError(progress.message)

    async def _take_step(self, done: StepDone) -> None:
        """Tell of a step; if one before it was lost on the way, of that one first: who writes a checkpoint has both."""
        self._reached(done.step + 1)
        if done.step > self._told:
            await self._save()
        await self._tell(done)

    async def _tell(self, done: StepDone) -> None:
        """Tell of a step, once."""
        if done.step >= self._told:
            self._told = done.step + 1
            await self._owner.step_done(done)

    async def _send_step(self, step: int) -> None:
        for item in self._course.slices(step, self._session.order.lease):
            await self._patiently(functools.partial(self._session.send, item))
        self._position = dataclasses.replace(self._position, sent=max(self._position.sent, step + 1))
        self._progressed_at = time.monotonic()

    async def _evaluate(self) -> None:
        """At an epoch's end have all validation sequences scored; a score that got lost is asked for again."""
        step, validation = self._position.done, self._course.validation
        if validation is None or step % self._course.plan.steps_per_epoch:
            return
        scores = self._scores = Scores(step, len(validation.sequences))
        to_send = scores.missing()
        while scores.missing():
            if to_send and scores.num_pending(to_send) < MAX_EVALUATIONS_IN_FLIGHT:
                index = to_send.pop(0)
                lease = self._session.order.lease
                item = make_evaluation(self._course.job_id, lease, step, index, validation.sequences[index])
                await self._patiently(functools.partial(self._session.send, item))
                self._progressed_at = time.monotonic()
            else:
                await self._wait(self._config.heartbeat_s)
            await self._absorb()
            self._next()
            if time.monotonic() - self._progressed_at >= self._config.stall_s:
                to_send, self._progressed_at = scores.missing(), time.monotonic()
        self._scores = None
        await self._owner.evaluated(step, scores.mean())

    async def _write_checkpoint(self) -> None:
        step = self._position.done
        artifact = naming.artifact_name(self._course.job_id, step)
        written = await self._patiently(lambda: self._session.checkpoint(artifact))
        if written.step != step:
            raise ExecutorLostError(f"executor {self._session.executor_id} wrote step {written.step} instead of {step}")
        await self._owner.checkpoint_written(artifact, step)
        self._saved, self._saved_at = step, time.monotonic()
        self._position = dataclasses.replace(self._position, checkpointed=step)

    async def _patiently(self, order: Callable[[], Awaitable[T]]) -> T:
        """The order's answer, asked again while the executor is overloaded."""
        while True:
            try:
                return await order()
            except OverloadedError as error:
                await self._wait(max(error.retry_after_s, 0.01))
                await self._absorb()
                self._next()

    async def _wait(self, timeout_s: float) -> None:
        """Until something arrives, at most so long."""
        if self._session.inbox:
            return
        self._session.wake.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._session.wake.wait()
        except TimeoutError:
            pass

    async def _probe_after_stall(self) -> None:
        """Progress messages may be lost: a living executor that is silent for long is asked for a checkpoint; it has a step."""
        if self._session.inbox or time.monotonic() - self._progressed_at < self._config.stall_s:
            return
        step = await self._save()
        await self._owner.progress_lost(step)
        self._reached(step)

    def _is_save_due(self) -> bool:
        is_late = time.monotonic() - self._saved_at >= self._config.checkpoint_every_s
        return is_late and self._position.done > self._saved

    async def _save(self) -> int:
        """Have the executor store what it has, whichever step that is by now: the steps in flight go on. Returns the step."""
        artifact = naming.interim_name(self._course.job_id, self._session.order.lease, self._num_saves)
        written = await self._patiently(lambda: self._session.checkpoint(artifact))
        for done in written.steps:  # before anybody can resume behind them
            self._reached(done.step + 1)
            await self._tell(done)
        await self._owner.saved(artifact, written.step)
        self._num_saves += 1
        self._saved, self._saved_at = written.step, time.monotonic()
        return written.step

    def _reached(self, done: int) -> None:
        """At least so many steps are done; whoever did them was sent them."""
        done = max(self._position.done, done)
        self._position = dataclasses.replace(self._position, done=done, sent=max(self._position.sent, done))
        self._progressed_at = time.monotonic()
