"""Names of jobs, artifacts, models and events. Pure; `now` is an argument."""

from __future__ import annotations

import re
import secrets

JOB_PREFIX = "ftjob-"
EVENT_PREFIX = "ftevent-"
CHECKPOINT_PREFIX = "ftckpt-"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_TIME_LENGTH = 8
"""Base-36 digits of a time in ms: enough until the year 2059."""


def new_job_id(now: float) -> str:
    """A fresh id; ids sort by the time of their creation."""
    random_part = "".join(secrets.choice(_DIGITS) for _ in range(8))
    return f"{JOB_PREFIX}{_base36(int(now * 1000)):0>{_TIME_LENGTH}}{random_part}"


def artifact_prefix(job_id: str) -> str:
    """What the names of all of a job's objects start with."""
    return f"{job_id}/"


def artifact_name(job_id: str, step: int) -> str:
    """The object that holds the adapter before step `step`."""
    return f"{artifact_prefix(job_id)}step-{step}"


def interim_name(job_id: str, lease: int, turn: int) -> str:
    """The object of a checkpoint that is only resumed from.

    Turns alternate, and leases differ, so that the one to resume from is never overwritten: it would be lost with the executor.
    """
    return f"{artifact_prefix(job_id)}latest-{lease}-{turn % 2}"


def optimizer_name(artifact: str) -> str:
    """The object beside an artifact that executors resume from."""
    return f"{artifact}.optimizer"


def model_name(base_model: str, suffix: str | None, job_id: str) -> str:
    """The finished adapter's model name; unique because the job's id is. What could not be typed into a URL becomes a dash."""
    return f"ft:{base_model}::{_UNSAFE.sub('-', suffix or 'heddle')}:{job_id.removeprefix(JOB_PREFIX)}"


def checkpoint_model_name(base_model: str, suffix: str | None, job_id: str, step: int) -> str:
    """The model name of the adapter as it was before step `step`."""
    return f"{model_name(base_model, suffix, job_id)}:ckpt-step-{step}"


def checkpoint_id(job_id: str, step: int) -> str:
    """The id of a job's checkpoint."""
    return f"{CHECKPOINT_PREFIX}{job_id.removeprefix(JOB_PREFIX)}-{step}"


def event_id(job_id: str, number: int) -> str:
    """The id of a job's event; events are numbered from 0 without gaps."""
    return f"{EVENT_PREFIX}{job_id.removeprefix(JOB_PREFIX)}-{number}"


def event_number(job_id: str, identifier: str) -> int | None:
    """The number in an event's id, None when it is not an id of this job."""
    number = identifier.removeprefix(f"{EVENT_PREFIX}{job_id.removeprefix(JOB_PREFIX)}-")
    return int(number) if number.isascii() and number.isdigit() and number != identifier else None


def result_file_id(job_id: str, kind: str) -> str:
    """The id of a file that the job made; the same each time it is made."""
    return f"file-{job_id.removeprefix(JOB_PREFIX)}-{kind}"


def _base36(value: int) -> str:
    digits = ""
    while value:
        value, digit = divmod(value, 36)
        digits = _DIGITS[digit] + digits
    return digits
