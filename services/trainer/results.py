"""A finished job's metrics as files: OpenAI's table of steps and TensorBoard's events. Pure; knows no storage."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.messages import JobEvent
from services.trainer import tensorboard

COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "full_valid_loss",
    "valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
}
"""The table's columns, OpenAI's first, and where metrics events have them."""
TAGS = {
    "train/loss": "train_loss",
    "train/token_accuracy": "train_mean_token_accuracy",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second",
    "validation/loss": "full_valid_loss",
    "validation/token_accuracy": "full_valid_mean_token_accuracy",
}
"""TensorBoard's tags."""


def step_table(metrics: Iterable[JobEvent]) -> bytes:
    """A CSV with a row per step; a step that was not validated has empty cells."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for event in metrics:
        writer.writerow([event.data.get(name, "") for name in COLUMNS.values()])
    return text.getvalue().encode()


def event_file(metrics: Sequence[JobEvent]) -> bytes:
    """All of a job's metrics as one TensorBoard file."""
    started_at = float(metrics[0].created_at) if metrics else 0.0
    return tensorboard.header(started_at) + b"".join(step_record(float(event.created_at), event.data) for event in metrics)


def step_record(now: float, data: Mapping[str, Any]) -> bytes:
    """One step's metrics, as TensorBoard's record."""
    values = {tag: float(data[name]) for tag, name in TAGS.items() if name in data}
    return tensorboard.scalars(now, int(data["step"]), values)
