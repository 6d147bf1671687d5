"""Finetuning jobs as their users see them: created, asked for, listed, with events and checkpoints."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]


class CreateJob(msgspec.Struct, frozen=True, kw_only=True, tag="create_job.1"):
    """The body of POST /v1/fine_tuning/jobs, as decoded from JSON; the trainer validates it."""

    body: dict[str, Any]


class JobQuery(msgspec.Struct, frozen=True, kw_only=True, tag="job_query.1"):
    """Get, cancel, pause, resume, or list events and checkpoints of one job, or list jobs (empty id)."""

    job_id: str = ""
    after: str = ""
    limit: int = 20


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed, in OpenAI's words."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(msgspec.Struct, frozen=True, kw_only=True, tag="job.1"):
    """A finetuning job as OpenAI's API shows it, plus our `lora` block and progress.

    The method `distillation` trains a drafter, whose files are among `result_files`; it has neither `lora` nor a model.
    """

    id: str
    created_at: int
    model: str
    training_file: str
    status: JobStatus
    hyperparameters: dict[str, Any]
    lora: dict[str, Any]
    seed: int
    method: Literal["supervised", "distillation"] = "supervised"
    finished_at: int | None = None
    fine_tuned_model: str | None = None
    error: JobError | None = None
    trained_tokens: int | None = None
    validation_file: str | None = None
    suffix: str | None = None
    metadata: dict[str, str] | None = None
    estimated_finish: int | None = None
    result_files: tuple[str, ...] = ()
    step: int = 0
    total_steps: int = 0


class JobPage(msgspec.Struct, frozen=True, kw_only=True, tag="job_page.1"):
    """A page of jobs, newest first."""

    data: tuple[FineTuningJob, ...]
    has_more: bool = False


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a job; `type` metrics carries step, train_loss and so on in `data`."""

    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = {}


class EventPage(msgspec.Struct, frozen=True, kw_only=True, tag="event_page.1"):
    """A page of a job's events, newest first."""

    data: tuple[JobEvent, ...]
    has_more: bool = False


class JobCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One stored checkpoint of a job."""

    id: str
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float] = {}


class CheckpointPage(msgspec.Struct, frozen=True, kw_only=True, tag="checkpoint_page.1"):
    """A page of a job's checkpoints, newest first."""

    data: tuple[JobCheckpoint, ...]
    has_more: bool = False
