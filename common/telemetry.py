"""Structured logs: JSON lines for machines, colours on a terminal. Knows structlog, not what is logged."""

from __future__ import annotations

import logging
import math
import sys

import structlog

LONGEST_PAUSE_S = 60.0


def configure_logging(service: str, instance_id: str, level: str = "info", log_format: str = "json") -> None:
    """Every log line of this process carries service and instance; lines go to stderr."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if log_format == "json" else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, instance=instance_id)


class Repetition:
    """When an error that comes again and again is told: at once, and then at intervals that double up to LONGEST_PAUSE_S.

    One that has not come for longer than that is news again.
    """

    def __init__(self) -> None:
        self.num_hidden = 0
        """Times that it was not told since it was told last."""
        self._pause_s = 0.0
        self._told_at = self._seen_at = -math.inf

    def is_due(self, now: float) -> bool:
        """It came at `now`: whether to tell."""
        if now - self._seen_at > LONGEST_PAUSE_S:
            self._pause_s = 0.0
        self._seen_at = now
        if now - self._told_at < self._pause_s:
            self.num_hidden += 1
            return False
        self._told_at, self._pause_s = now, min(max(1.0, 2 * self._pause_s), LONGEST_PAUSE_S)
        return True
