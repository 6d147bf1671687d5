"""Texts and jobs of distillation on the tiny model: what its tests play with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.messages import DrafterSpec, OptimizerStep, TrainingSlice
from kernels.drafting.head import DraftHead, Span
from kernels.drafting.training import Truth, row_losses, step_weights
from services.executor.distillation import DistillationJob
from services.executor.engine import Engine
from services.executor.lesson import LessonSequence
from services.executor.views import Limits
from tests.tiny import Driver, random_prompt, tiny_engine, tiny_pair

VOCABULARY = tuple(range(3, 90))
SPEC = DrafterSpec(vocabulary=VOCABULARY, num_steps=3)
RATE = OptimizerStep(learning_rate=1e-2)
TIGHT = Limits(idle_iteration_ms=5.0)


def new_job(spec: DrafterSpec = SPEC, seed: int = 1) -> DistillationJob:
    return DistillationJob("job", spec, tiny_pair()[1], "name", seed)


def lesson(step: int, index: int = 0, num_tokens: int = 40, *, is_last: bool = True, **fields: Any) -> TrainingSlice:
    """A text whose second half is an answer."""
    weights = [0.0] * (num_tokens // 2) + [2.0 / num_tokens] * (num_tokens - num_tokens // 2)
    values: dict[str, Any] = {"tokens": random_prompt(num_tokens, seed=100 * step + index), "weights": tuple(weights)}
    optimizer = RATE if is_last else None
    return TrainingSlice(job_id="job", lease=1, step=step, index=index, optimizer=optimizer, **(values | fields))


def texts(num_steps: int) -> list[TrainingSlice]:
    """Steps of two texts of many lengths, of the same few in turn."""
    sizes = (40, 75, 23, 90)
    return [
        lesson(step, i, sizes[(2 * step + i) % 4], is_last=i == 1, tokens=random_prompt(sizes[(2 * step + i) % 4], seed=i))
        for step in range(num_steps)
        for i in range(2)
    ]


def opened(slices: Sequence[TrainingSlice], job: DistillationJob | None = None, **options: Any) -> Engine:
    """An engine with the job and its work; pages for the longest text."""
    engine = tiny_engine(tiny_pair()[1], **{"num_pages": 512, **options})
    engine.training.open(job or new_job(), 1)
    for item in slices:
        engine.training.accept(item)
    return engine


def trained(slices: Sequence[TrainingSlice], job: DistillationJob | None = None, **options: Any) -> list[float]:
    """The losses of all steps."""
    driver = Driver(opened(slices, job, **options))
    driver.run(100_000)
    failures = [event.failure for event in driver.events if event.failure]
    assert not failures
    return [event.step.loss for event in driver.events if event.step is not None]


def forwarded(job: DistillationJob, item: TrainingSlice) -> LessonSequence:
    """The lesson, its rows gone through the model in windows of 32 or fewer."""
    engine = opened([item], job, limits=TIGHT)
    while not job.is_forwarded:
        engine.forward_pass()
    (sequence,) = job.group
    return sequence


def whole_loss(head: DraftHead, sequence: LessonSequence, item: TrainingSlice) -> Tensor:
    """As `heddle distill` computes it: the text as one batch."""
    rows_R, num_rows, num_steps = torch.tensor(sequence.trained), sequence.num_rows, SPEC.num_steps
    padded_T = torch.cat([sequence.places_T, torch.zeros(num_steps, dtype=torch.int64)])
    weights_T = torch.cat([torch.tensor(item.weights), torch.zeros(num_steps + 1)])
    following_TS = torch.stack([padded_T[1 + step : 1 + step + num_rows] for step in range(num_steps)], dim=1)
    outs = head.unroll(sequence.features_TF.float(), following_TS, [Span(0, num_rows, rows_R)], num_steps)
    total = torch.zeros(())
    for step, (out_RH, share) in enumerate(zip(outs, step_weights(num_steps), strict=True)):
        truth: Truth = sequence.truth(rows_R + 1 + step)
        losses_R = row_losses(head, out_RH, truth, torch.arange(len(head.head_VH)))
        total = total + share * (weights_T[rows_R + 2 + step] * losses_R).sum()
    return total
