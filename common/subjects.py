"""Every NATS subject, queue group and JetStream bucket, each built in one place. Knows names, not messages."""

PREFIX = "heddle.v1."

INFER = PREFIX + "infer"
"""Tokenized requests, queue group `admission`."""
GENERATE = PREFIX + "generate"
"""OpenAI-shaped request bodies from NATS clients, queue group `gateway`; chunks go to the reply subject."""
CLAIM = PREFIX + "planner.claim"
ALL_BEATS = PREFIX + "beat.*.*"
ALL_CANCELS = PREFIX + "cancel.*"
ALL_PROGRESS = PREFIX + "job.*.progress"
FINETUNE = PREFIX + "finetune"
"""Prefix of the trainer's endpoints: create, get, list, cancel, pause, resume, events, checkpoints."""

ADAPTERS_BUCKET = "heddle_adapters"
JOBS_BUCKET = "heddle_jobs"
JOB_EVENTS_BUCKET = "heddle_job_events"
PROFILES_BUCKET = "heddle_profiles"
FILES_STORE = "heddle_files"
ARTIFACTS_STORE = "heddle_artifacts"


def stream(request_id: str) -> str:
    """TokenChunks of one request."""
    return f"{PREFIX}stream.{request_id}"


def cancel(request_id: str) -> str:
    """Cancel of one request."""
    return f"{PREFIX}cancel.{request_id}"


def executor_admit(executor_id: str) -> str:
    """Admit to one executor."""
    return f"{PREFIX}executor.{executor_id}.admit"


def executor_trees(executor_id: str) -> str:
    """DraftTrees to one executor."""
    return f"{PREFIX}executor.{executor_id}.trees"


def executor_slices(executor_id: str) -> str:
    """OpenJob, TrainingSlice, WriteCheckpoint and CloseJob to one executor."""
    return f"{PREFIX}executor.{executor_id}.slices"


def check_adapter(base_model: str) -> str:
    """CheckAdapter to any executor that serves this base model, queue group `executor`."""
    return f"{PREFIX}adapters.check.{base_model.encode().hex()}"


def planner_report(planner_id: str) -> str:
    """IterationReports to one planner."""
    return f"{PREFIX}planner.{planner_id}.report"


def job_progress(job_id: str) -> str:
    """StepDone and JobFailed of one job."""
    return f"{PREFIX}job.{job_id}.progress"


def beat(role: str, instance_id: str) -> str:
    """Heartbeats of one service instance."""
    return f"{PREFIX}beat.{role}.{instance_id}"


def finetune(verb: str) -> str:
    """One endpoint of the trainer's API."""
    return f"{FINETUNE}.{verb}"


def adapter_key(name: str) -> str:
    """Key of an adapter in ADAPTERS_BUCKET; names hold characters such as ':' that keys may not."""
    return name.encode().hex()
