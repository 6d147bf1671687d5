"""Settings of the trainer. Knows limits and periods, not jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from common.config import ServiceConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig(ServiceConfig):
    """Read from HEDDLE_TRAINER_<FIELD>, else HEDDLE_<FIELD>."""

    model_dir: Path = Path()
    """Folder of the base model's tokenizer and chat template; the weights are not read."""
    tensorboard_dir: Path | None = None
    """Each job's metrics go to a TensorBoard run of its name in this folder as they come; None: nowhere."""
    max_concurrent_jobs: int = 4
    """Jobs that one trainer runs at a time; more wait in the queue or run on other trainers."""
    max_sequence_length: int = 2048
    """Longer training examples are errors; what executors say that they train on bounds it too."""
    max_file_reads: int = 4
    """A job whose training file cannot be read in so many tries has failed."""
    file_retry_s: float = 1.0
    """Pause after the first of these tries; it doubles each time."""
    max_steps_in_flight: int = 2
    """Optimizer steps sent but not done: enough to keep the executor busy, few enough to pause soon."""
    lease_s: float = 10.0
    """A job whose owner has not renewed its lease for so long is taken over. Trainers' clocks must agree far better."""
    renew_s: float = 2.0
    """Period of lease renewals and of progress in the job's record."""
    resync_s: float = 30.0
    """The job table is read afresh this often, in case the server lost a watch."""
    request_timeout_s: float = 5.0
    """For slices, which the executor only queues, and for deletions of artifacts."""
    open_timeout_s: float = 60.0
    """For opening, checkpoints and closing, which move tensors."""
    checkpoint_every_s: float = 60.0
    """A job of long epochs writes a checkpoint to resume from this often; users see only those at an epoch's end."""
    stall_s: float = 60.0
    """Without a finished step for so long, ask the executor where it is: progress messages may be lost."""
    max_attempts: int = 5
    """A job that loses its executor so often without a new step in between has failed."""
    drain_s: float = 10.0
    """Time for running jobs to write a checkpoint when the trainer stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.model_dir / "tokenizer.json").is_file(), "model_dir", "be a folder with tokenizer.json")
        for name in ("max_concurrent_jobs", "max_steps_in_flight", "max_attempts", "max_file_reads"):
            require(getattr(self, name) >= 1, name, "be at least 1")
        require(self.max_sequence_length >= 2, "max_sequence_length", "be at least 2")
        for name in (
            "renew_s",
            "resync_s",
            "request_timeout_s",
            "open_timeout_s",
            "stall_s",
            "file_retry_s",
            "checkpoint_every_s",
        ):
            require(getattr(self, name) > 0, name, "be positive")
        require(self.drain_s >= 0, "drain_s", "not be negative")
        require(self.lease_s >= 3 * self.renew_s, "lease_s", "be at least 3 * renew_s")
