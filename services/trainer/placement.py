"""Which executor trains a job. Pure; knows heartbeats only."""

from __future__ import annotations

from collections.abc import Iterable

from common.messages import Beat, ExecutorLoad


def serving(beats: Iterable[Beat], base_model: str) -> list[Beat]:
    """The ready executors with this base model."""
    return [b for b in beats if b.role == "executor" and b.state == "ready" and b.executor and b.executor.model == base_model]


def max_training_len(beats: Iterable[Beat], base_model: str) -> int | None:
    """The longest sequence that some executor with this model trains on, None without such an executor."""
    return max((_max_len(beat.executor) for beat in serving(beats, base_model) if beat.executor), default=None)


def choose_executor(beats: Iterable[Beat], base_model: str, longest: int, prefer: str) -> str | None:
    """The executor with the fewest jobs that trains on the longest sequence; `prefer` if it can: it may know the job."""
    fitting = [b for b in serving(beats, base_model) if b.executor and _max_len(b.executor) >= longest]
    ranked = sorted(fitting, key=lambda b: (b.instance_id != prefer, b.gauges.get("jobs", 0.0), b.instance_id))
    return ranked[0].instance_id if ranked else None


def _max_len(load: ExecutorLoad) -> int:
    """An executor that does not say what it trains on may train on all that it serves."""
    return load.max_training_tokens or load.max_model_len
