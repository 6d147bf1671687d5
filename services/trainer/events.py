"""What is said in a job's events. Pure; `now` is an argument; knows no storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from common.messages import JobEvent, OptimizerStep, StepDone
from services.trainer.evaluation import Evaluation

Level = Literal["info", "warn", "error"]


def message(now: float, text: str, level: Level = "info", data: Mapping[str, Any] | None = None) -> JobEvent:
    """Something that happened to the job. The log gives events their ids."""
    return JobEvent(id="", created_at=int(now), level=level, message=text, data=dict(data or {}))


def metrics(
    now: float, done: StepDone, update: OptimizerStep, total_steps: int, evaluation: Evaluation | None = None
) -> JobEvent:
    """The numbers of one step, and of the evaluation behind it; steps count from 1 for users."""
    data = {
        **step_metrics(done),
        **(evaluation.metrics() if evaluation else {}),
        "total_steps": total_steps,
        "learning_rate": update.learning_rate,
        "grad_norm": done.grad_norm,
        "tokens_per_second": tokens_per_second(done),
    }
    text = f"Step {done.step + 1}/{total_steps}: training loss={done.loss:.4f}"
    if evaluation is not None:
        text += f", full validation loss={evaluation.loss:.4f}"
    return JobEvent(id="", created_at=int(now), level="info", message=text, type="metrics", data=data)


def step_metrics(done: StepDone) -> dict[str, float]:
    """A step's metrics in OpenAI's words."""
    return {
        "step": done.step + 1,
        "train_loss": done.loss,
        "train_mean_token_accuracy": done.num_correct / done.num_tokens if done.num_tokens else 0.0,
    }


def tokens_per_second(done: StepDone) -> float:
    """Of one step, counted from the end of the one before."""
    return 1000.0 * done.num_sequence_tokens / done.elapsed_ms if done.elapsed_ms > 0 else 0.0


def gauges(steps: Sequence[StepDone]) -> dict[str, float]:
    """The newest steps of jobs that train now, as metrics: speeds add up, the rest are means over jobs."""
    if not steps:
        return {}
    return {
        "tokens_per_second": sum(tokens_per_second(done) for done in steps),
        "train_loss": sum(done.loss for done in steps) / len(steps),
        "train_mean_token_accuracy": sum(step_metrics(done)["train_mean_token_accuracy"] for done in steps) / len(steps),
        "grad_norm": sum(done.grad_norm for done in steps) / len(steps),
    }
