"""Which sequences form which optimizer step, their loss weights and the learning rate. Pure and deterministic."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from functools import lru_cache

from common.messages import EvaluationSlice, OptimizerStep, TrainingSlice
from services.trainer.dataset import TrainingSequence
from services.trainer.spec import JobSpec, Scheduler


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A job's steps: every epoch is a new order of all sequences, cut into batches; the last batch may be smaller."""

    num_sequences: int
    batch_size: int
    n_epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return -(-self.num_sequences // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Batches of all epochs."""
        return self.steps_per_epoch * self.n_epochs

    def batch(self, step: int) -> tuple[int, ...]:
        """Indices of the sequences of one step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_sequences, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]


def plan_steps(spec: JobSpec, num_sequences: int) -> StepPlan:
    """The steps of a job over so many sequences."""
    return StepPlan(num_sequences=num_sequences, batch_size=spec.batch_size, n_epochs=spec.n_epochs, seed=spec.seed)


@lru_cache(maxsize=32)
def epoch_order(num_sequences: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A random order that depends on (seed, epoch) alone; Python keeps `random()`, unlike `shuffle`, stable over versions."""
    source = random.Random(f"{seed}/{epoch}")
    return tuple(sorted(range(num_sequences), key=lambda _: source.random()))


def learning_rate_factor(scheduler: Scheduler, step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate that step `step` (from 0) uses: linear warm-up, then the schedule's decay to 0."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    rest = max(1, total_steps - warmup_steps)
    if scheduler == "constant":
        return 1.0
    if scheduler == "linear":
        return max(0.0, (total_steps - step) / rest)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / rest)))


def optimizer_step(spec: JobSpec, step: int, total_steps: int) -> OptimizerStep:
    """The update that ends a step."""
    factor = learning_rate_factor(spec.scheduler, step, spec.warmup_steps, total_steps)
    return OptimizerStep(
        learning_rate=spec.learning_rate * factor,
        method=spec.optimizer,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
    )


def make_slices(
    job_id: str, lease: int, step: int, sequences: Sequence[TrainingSequence], update: OptimizerStep
) -> list[TrainingSlice]:
    """One step's slices. Every trained token of the step weighs the same, so the step's loss is their mean."""
    weight = 1.0 / sum(sum(sequence.in_loss) for sequence in sequences)
    return [
        TrainingSlice(
            job_id=job_id,
            lease=lease,
            step=step,
            index=index,
            tokens=sequence.tokens,
            weights=tuple(weight if trained else 0.0 for trained in sequence.in_loss),
            optimizer=update if index == len(sequences) - 1 else None,
        )
        for index, sequence in enumerate(sequences)
    ]


def make_evaluation(job_id: str, lease: int, step: int, index: int, sequence: TrainingSequence) -> EvaluationSlice:
    """A sequence of the validation file, to be scored before a step; the weights are left to whoever takes the mean."""
    weights = tuple(1.0 if trained else 0.0 for trained in sequence.in_loss)
    return EvaluationSlice(job_id=job_id, lease=lease, step=step, index=index, tokens=sequence.tokens, weights=weights)
