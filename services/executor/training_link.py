"""The executor's side of finetuning on the bus: jobs, slices, checkpoints, finished steps. Knows no tensors."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from nats.errors import Error as NatsError
from nats.js.errors import NotFoundError

from common import subjects
from common.artifacts import read_object
from common.bus import Bus, BusError
from common.fingerprint import fingerprint
from common.messages import (
    CheckpointWritten,
    CloseJob,
    EvaluationSlice,
    JobClosed,
    JobFailed,
    JobOpened,
    OpenJob,
    Rejected,
    SequenceEvaluated,
    SliceAccepted,
    StepDone,
    TrainingSlice,
    WriteCheckpoint,
)
from services.executor.adapter_spec import InvalidAdapterError, check_rank
from services.executor.config import ExecutorConfig
from services.executor.distillation import DistillationJob
from services.executor.finetune import FinetuneJob, new_job
from services.executor.inbox import Inbox
from services.executor.job_steps import OutOfOrderSliceError, StepResult
from services.executor.startup import OnDevice
from services.executor.training import TooManySlicesError, Training
from services.executor.training_sequence import InvalidSliceError
from services.executor.training_work import TrainingEvent

log = structlog.get_logger()

CHECKPOINT_TIMEOUT_S = 60.0


class TrainingLink:
    """Handles the trainer's orders; the slices of a job arrive in order."""

    def __init__(
        self, bus: Bus, config: ExecutorConfig, model: str, training: Training, inbox: Inbox, on_device: OnDevice
    ) -> None:
        self._bus = bus
        self._config = config
        self._model = model
        self._training = training
        self._inbox = inbox
        self._on_device = on_device
        self._is_draining = False

    async def start(self) -> None:
        """Accept orders from now on."""
        subject = subjects.executor_slices(self._config.instance_id)
        orders: Any = OpenJob | TrainingSlice | EvaluationSlice | WriteCheckpoint | CloseJob
        await self._bus.subscribe(subject, orders, self._on_order, concurrent=True)

    async def drain(self) -> None:
        """Open no more jobs, and forget those that are open: their trainer goes on elsewhere from the last checkpoint."""
        self._is_draining = True
        await self._inbox.ask(self._training.close_all)

    async def publish(self, events: Sequence[TrainingEvent]) -> None:
        """Tell trainers of finished steps and failed jobs."""
        for event in events:
            try:
                await self._bus.publish(subjects.job_progress(event.job_id), _progress(event))
            except (BusError, NatsError) as error:  # the trainer probes a job that is silent for long
                log.warning("job.unreported", job=event.job_id, error=str(error) or type(error).__name__)

    async def _on_order(self, order: OpenJob | TrainingSlice | EvaluationSlice | WriteCheckpoint | CloseJob) -> Any:
        if stale := self._stale(order.job_id, order.lease):
            return stale
        match order:
            case OpenJob():
                return await self._open(order)
            case CloseJob():
                return await self._inbox.ask(lambda: self._close(order))
            case _ if self._training.lease(order.job_id) != order.lease:
                return Rejected(reason="not_found", message=f"job {order.job_id} is not open here under lease {order.lease}")
            case TrainingSlice() | EvaluationSlice():
                return await self._inbox.ask(lambda: self._accept(order))
            case WriteCheckpoint():
                return await self._write(order)

    async def _open(self, order: OpenJob) -> JobOpened | Rejected:
        if order.base_model != self._model:
            return Rejected(reason="unknown_model", message=f"this executor serves {self._model}, not {order.base_model}")
        if refused := self._full(order.job_id):
            return refused
        try:
            if order.drafter is None:
                check_rank(order.lora, self._config.max_lora_rank, "lora.")
        except InvalidAdapterError as error:
            return Rejected(reason="invalid", message=f"{error}: nobody could serve it")
        checkpoint = None
        try:
            if order.checkpoint is not None:
                store = await self._bus.object_store(subjects.ARTIFACTS_STORE)
                checkpoint = await read_object(store, optimizer_object(order.checkpoint), CHECKPOINT_TIMEOUT_S)
            drafts_for = "" if order.drafter is None else await asyncio.to_thread(fingerprint, Path(self._config.model_dir))
            job = await self._on_device(lambda: self._make(order, checkpoint, drafts_for))
        except NotFoundError:
            return Rejected(reason="not_found", message=f"there is no checkpoint {order.checkpoint}")
        except TimeoutError:
            message = f"the checkpoint {order.checkpoint} could not be read in {CHECKPOINT_TIMEOUT_S} s"
            return Rejected(reason="overloaded", message=message, retry_after_ms=1000)
        except InvalidAdapterError as error:
            return Rejected(reason="invalid", message=str(error))
        except (RuntimeError, MemoryError) as error:  # torch reports a lack of memory as RuntimeError
            return Rejected(reason="invalid", message=f"the job does not fit: {error}")
        return await self._inbox.ask(lambda: self._hold(job, order.lease))

    def _hold(self, job: FinetuneJob | DistillationJob, lease: int) -> JobOpened | Rejected:
        """Making the job took a while: other orders may have come first."""
        if refused := self._stale(job.job_id, lease) or self._full(job.job_id):
            return refused
        self._training.open(job, lease)
        log.info("job.opened", job=job.job_id, lease=lease, step=job.step)
        return JobOpened(job_id=job.job_id, executor_id=self._config.instance_id, step=job.step)

    def _stale(self, job_id: str, lease: int) -> Rejected | None:
        held = self._training.lease(job_id)
        if held is None or lease >= held:
            return None
        return Rejected(reason="stale_lease", message=f"job {job_id} is held under lease {held}")

    def _full(self, job_id: str) -> Rejected | None:
        if self._is_draining:
            return Rejected(reason="draining", message="this executor is shutting down", retry_after_ms=1000)
        if self._training.num_jobs < self._config.max_jobs or self._training.lease(job_id) is not None:
            return None
        return Rejected(reason="overloaded", message=f"{self._config.max_jobs} jobs are open", retry_after_ms=5000)

    def _close(self, order: CloseJob) -> JobClosed | Rejected:
        if stale := self._stale(order.job_id, order.lease):
            return stale
        self._training.close(order.job_id)
        return JobClosed(job_id=order.job_id)

    def _make(self, order: OpenJob, checkpoint: bytes | None, drafts_for: str) -> FinetuneJob | DistillationJob:
        decoder, share = self._training.decoder, self._config.max_recompute_share
        job: FinetuneJob | DistillationJob
        if order.drafter is not None:
            job = DistillationJob(order.job_id, order.drafter, decoder, drafts_for, order.seed)
        else:
            job = new_job(order.job_id, order.lora, order.seed, decoder, self._training.cache, share)
        if checkpoint is not None:
            job.restore(checkpoint)
        return job

    def _accept(self, item: TrainingSlice | EvaluationSlice) -> SliceAccepted | Rejected:
        if self._training.lease(item.job_id) != item.lease:
            return Rejected(reason="not_found", message=f"job {item.job_id} is not open here any more")
        try:
            self._training.accept(item)
        except OutOfOrderSliceError as error:
            return Rejected(reason="invalid", message=str(error), retry_after_ms=1)
        except InvalidSliceError as error:
            return Rejected(reason="invalid", message=str(error))
        except TooManySlicesError as error:
            return Rejected(reason="overloaded", message=str(error), retry_after_ms=500)
        return SliceAccepted(job_id=item.job_id, step=item.step, index=item.index)

    async def _write(self, order: WriteCheckpoint) -> CheckpointWritten | Rejected:
        """What is trained goes under the artifact's name, an adapter as PEFT's file; what resuming needs goes beside it."""
        job = await self._inbox.ask(lambda: self._training.held(order.job_id, order.lease))
        if job is None:
            return Rejected(reason="not_found", message=f"job {order.job_id} is not open here any more")
        # On the device's thread no step can change the job meanwhile, and the event loop goes on.
        trained, state, step, last = await self._on_device(
            lambda: (job.artifact(), job.checkpoint(), job.step, self._training.last_steps(order.job_id, order.lease))
        )
        store = await self._bus.object_store(subjects.ARTIFACTS_STORE)
        await store.put(optimizer_object(order.artifact), state)
        await store.put(order.artifact, trained)
        steps = tuple(_step_done(event, event.step) for event in last if event.step is not None and event.step.step < step)
        return CheckpointWritten(job_id=order.job_id, artifact=order.artifact, step=step, num_bytes=len(trained), steps=steps)


def optimizer_object(artifact: str) -> str:
    """Name of the object that holds what resuming from an artifact needs: weights, moments, step."""
    return f"{artifact}.optimizer"


def _progress(event: TrainingEvent) -> StepDone | SequenceEvaluated | JobFailed:
    if event.score is not None:
        return SequenceEvaluated(job_id=event.job_id, lease=event.lease, **dataclasses.asdict(event.score))
    if event.step is None:
        return JobFailed(job_id=event.job_id, lease=event.lease, message=event.failure)
    return _step_done(event, event.step)


def _step_done(event: TrainingEvent, step: StepResult) -> StepDone:
    return StepDone(
        job_id=event.job_id,
        lease=event.lease,
        step=step.step,
        loss=step.loss,
        grad_norm=step.grad_norm,
        num_correct=step.num_correct,
        num_tokens=step.num_tokens,
        num_sequence_tokens=step.num_sequence_tokens,
        elapsed_ms=event.elapsed_ms,
    )
