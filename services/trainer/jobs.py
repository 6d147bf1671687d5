"""A job's record and every change that it may undergo. Pure; `now` is an argument; knows no bucket."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import msgspec

from common.messages import FineTuningJob, JobCheckpoint, JobError, JobStatus
from services.trainer import naming
from services.trainer.spec import ApiError, JobSpec, job_hyperparameters, job_lora

OPEN: tuple[JobStatus, ...] = ("validating_files", "queued", "running")
"""States in which a trainer has something to do."""
FINAL: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")


class JobRecord(msgspec.Struct, frozen=True, kw_only=True, tag="job_record.1"):
    """Entry of the KV bucket `heddle_jobs`: the job as users see it, and who runs it.

    `owner` may work until `lease_expires_at`; `lease` grows with every claim and every executor, and fences both.
    `checkpoint` is the artifact to resume from; it holds the state before step `checkpoint_step`. It is one of `checkpoints`,
    which users see and whose adapters are kept, or an interim one, which the next replaces.
    """

    job: FineTuningJob
    spec: JobSpec
    owner: str = ""
    lease: int = 0
    lease_expires_at: float = 0.0
    wish: Literal["none", "pause"] = "none"
    executor_id: str = ""
    checkpoint: str | None = None
    checkpoint_step: int = 0
    checkpoints: tuple[JobCheckpoint, ...] = ()
    has_begun: bool = False
    """Whether an executor has ever opened it."""


class SupersededError(Exception):
    """The record is not ours any more: it was cancelled, paused, or taken over. `record` is what it is now."""

    def __init__(self, record: JobRecord) -> None:
        super().__init__(f"{record.job.id} is {record.job.status}, owned by {record.owner or 'nobody'}, lease {record.lease}")
        self.record = record


def new_record(job_id: str, spec: JobSpec, now: float) -> JobRecord:
    """A job that was just created."""
    job = FineTuningJob(
        id=job_id,
        created_at=int(now),
        model=spec.model,
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        status="validating_files",
        hyperparameters=job_hyperparameters(spec),
        lora=job_lora(spec),
        method="supervised" if spec.drafter is None else "distillation",
        seed=spec.seed,
        suffix=spec.suffix,
        metadata=spec.metadata,
    )
    return JobRecord(job=job, spec=spec)


def with_job(record: JobRecord, **changes: object) -> JobRecord:
    """The record with these fields of its job changed."""
    return msgspec.structs.replace(record, job=msgspec.structs.replace(record.job, **changes))


# --- ownership ---------------------------------------------------------------------------------------------------------


def is_claimable(record: JobRecord, owner: str, now: float) -> bool:
    """Whether this trainer may take the job: there is work, and nobody else does it. Its own lease is from an earlier life."""
    return record.job.status in OPEN and (record.owner in ("", owner) or record.lease_expires_at <= now)


def claim(record: JobRecord, owner: str, now: float, lease_s: float, *, validates: bool) -> JobRecord:
    """The record with a new owner, who wants to validate or to train it.

    Raises SupersededError when it is not free, or not in that state, any more: our picture of the table may be older than
    the record, and only training takes one of the owner's slots.
    """
    if not is_claimable(record, owner, now) or is_new(record) != validates:
        raise SupersededError(record)
    return msgspec.structs.replace(record, owner=owner, lease=record.lease + 1, lease_expires_at=now + lease_s)


def require_held(record: JobRecord, owner: str, lease: int) -> None:
    """Raises SupersededError unless this owner still holds the job with this lease."""
    if record.job.status not in OPEN or (record.owner, record.lease) != (owner, lease):
        raise SupersededError(record)


def released(record: JobRecord, status: JobStatus) -> JobRecord:
    """The record without owner, in this state."""
    free = msgspec.structs.replace(record, owner="", lease_expires_at=0.0, wish="none", executor_id="")
    return with_job(free, status=status, estimated_finish=None)


def is_new(record: JobRecord) -> bool:
    """Whether the job's file is still to be validated."""
    return record.job.status == "validating_files"


def choose_claims(records: Iterable[JobRecord], owner: str, busy: Collection[str], free_slots: int, now: float) -> list[str]:
    """The jobs that this trainer should claim now, oldest first: all to validate, and as many to run as it has slots."""
    free = [r for r in records if r.job.id not in busy and is_claimable(r, owner, now)]
    ids = {kind: sorted(r.job.id for r in free if is_new(r) == kind) for kind in (True, False)}
    return ids[True] + ids[False][: max(0, free_slots)]


# --- what users ask ----------------------------------------------------------------------------------------------------


def cancel(record: JobRecord, now: float) -> JobRecord:
    """The cancelled job, its checkpoints gone; its owner notices that it lost it. Raises ApiError 409 when the job is over."""
    if record.job.status in FINAL:
        raise _wrong_state(record, "cancelled")
    executor_id = record.executor_id
    record = with_job(released(record, "cancelled"), finished_at=int(now))
    return msgspec.structs.replace(record, executor_id=executor_id, checkpoint=None, checkpoints=())


def pause(record: JobRecord) -> JobRecord:
    """A running job gets the wish to pause, so that its owner writes a checkpoint first; a queued job pauses at once."""
    if record.job.status == "running":
        return msgspec.structs.replace(record, wish="pause")
    if record.job.status != "queued":
        raise _wrong_state(record, "paused")
    return released(record, "paused")


def resume(record: JobRecord) -> JobRecord:
    """A paused job queues again; a job that was still about to pause runs on."""
    if record.job.status == "paused":
        return released(record, "queued")
    if record.wish != "pause":
        raise _wrong_state(record, "resumed")
    return msgspec.structs.replace(record, wish="none")


def _wrong_state(record: JobRecord, verb: str) -> ApiError:
    return ApiError(409, f"job {record.job.id} is {record.job.status} and cannot be {verb}", "invalid_job_state")


# --- what its owner reports --------------------------------------------------------------------------------------------


def renewed(record: JobRecord, now: float, lease_s: float, step: int, estimated_finish: int | None) -> JobRecord:
    """The lease prolonged and the progress told."""
    record = msgspec.structs.replace(record, lease_expires_at=now + lease_s)
    return with_job(record, step=step, estimated_finish=estimated_finish)


def placed(record: JobRecord, executor_id: str) -> JobRecord:
    """A new attempt on this executor, under a lease of its own."""
    return msgspec.structs.replace(record, executor_id=executor_id, lease=record.lease + 1)


def begun(record: JobRecord, step: int) -> JobRecord:
    """An executor goes on from this step."""
    return with_job(msgspec.structs.replace(record, has_begun=True), status="running", step=step)


def checkpointed(record: JobRecord, artifact: str, step: int, metrics: dict[str, float], now: float) -> JobRecord:
    """One more checkpoint, which is the one to resume from. The last one's model is the finished one, as OpenAI lists it."""
    is_last = step == record.job.total_steps
    base = (record.spec.model, record.spec.suffix, record.job.id)
    name = naming.model_name(*base) if is_last else naming.checkpoint_model_name(*base, step)
    entry = JobCheckpoint(
        id=naming.checkpoint_id(record.job.id, step),
        created_at=int(now),
        fine_tuning_job_id=record.job.id,
        fine_tuned_model_checkpoint=name,
        step_number=step,
        metrics=metrics,
    )
    others = tuple(c for c in record.checkpoints if c.step_number != step)
    record = msgspec.structs.replace(record, checkpoint=artifact, checkpoint_step=step, checkpoints=(*others, entry))
    return with_job(record, step=step)


def saved(record: JobRecord, artifact: str, step: int) -> JobRecord:
    """An interim checkpoint: to resume from, not offered to users."""
    return with_job(msgspec.structs.replace(record, checkpoint=artifact, checkpoint_step=step), step=step)


def needed_objects(record: JobRecord) -> frozenset[str]:
    """The objects in the artifact store that the job still needs: adapters that users see, and what to resume from."""
    if record.job.status in ("failed", "cancelled"):
        return frozenset()
    adapters = {naming.artifact_name(record.job.id, listed.step_number) for listed in record.checkpoints}
    newest = {record.checkpoint} if record.checkpoint else set[str]()
    resumable = set[str]() if record.job.status == "succeeded" else {naming.optimizer_name(name) for name in newest}
    return frozenset(adapters | newest | resumable)


def succeeded(record: JobRecord, model: str | None, trained_tokens: int, files: tuple[str, ...], now: float) -> JobRecord:
    """The job is done, its adapter has this model name (a drafter none), and these files are what it leaves."""
    done = released(record, "succeeded")
    return with_job(done, fine_tuned_model=model, trained_tokens=trained_tokens, result_files=files, finished_at=int(now))


def failed(record: JobRecord, error: JobError, now: float) -> JobRecord:
    """The job ended with this error; its checkpoints go."""
    record = msgspec.structs.replace(released(record, "failed"), checkpoint=None, checkpoints=())
    return with_job(record, error=error, finished_at=int(now))
