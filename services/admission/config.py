"""Settings of admission; knows no executor."""

from __future__ import annotations

import dataclasses

from common.config import ServiceConfig, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdmissionConfig(ServiceConfig):
    """Limits of the queue that admission lets grow, and its patience with executors."""

    prefill_chunk: int = 256
    """Prompt tokens that an executor is assumed to compute per iteration while it also decodes; TTFT predictions use it."""
    max_backlog_ms: float = 10_000.0
    """Best effort ends where the prompts ahead of a request take longer than this."""
    max_waiting: int = 64
    """Best effort also ends where this many requests wait for their prefill."""
    admit_timeout_s: float = 4.0
    """An executor that does not answer for this long counts as dead until its next heartbeat; it answers between iterations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prefill_chunk >= 1, "prefill_chunk", "be at least 1")
        require(self.max_backlog_ms > 0, "max_backlog_ms", "be positive")
        require(self.max_waiting >= 1, "max_waiting", "be at least 1")
        require(self.admit_timeout_s > 0, "admit_timeout_s", "be positive")
