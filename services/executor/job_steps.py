"""A job's slices in order, those in work together, and what its steps came to. Knows neither what is trained nor how.

Short slices of a step are in work together, as a group: they share passes.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from common.messages import OptimizerStep, TrainingSlice
from services.executor.adapter_spec import InvalidAdapterError
from services.executor.evaluation import Score
from services.executor.lora import LoraAdapter
from services.executor.model import Decoder
from services.executor.training_sequence import InvalidSliceError, check_slice

MAX_GROUP_ROWS = 512
"""Rows of sequences in work together: enough for large matmuls, and their activations take what one long sequence would."""


class OutOfOrderSliceError(InvalidSliceError):
    """A slice before this one is missing."""


class TrainingDivergedError(Exception):
    """Loss or gradient stopped being finite; what the job trains still is what the last good step left."""

    def __init__(self, job_id: str, step: int, what: str, value: float) -> None:
        super().__init__(f"job {job_id}: the {what} of step {step} is {value}; a lower learning rate may help")
        self.job_id, self.step = job_id, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an optimizer step did; the fields are StepDone's."""

    step: int
    loss: float
    grad_norm: float
    num_correct: int
    num_tokens: int
    num_sequence_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupResult:
    """A group that is through, which has no more use for its slots; `step` at a step's end, `score` if it was held out."""

    num_sequences: int
    step: StepResult | None = None
    score: Score | None = None


class StepSequence(Protocol):
    """A slice in work; `num_rows` ends before the last predicted token."""

    item: TrainingSlice
    tokens: tuple[int, ...]
    num_rows: int
    num_forwarded: int
    num_correct: int
    num_tokens: int
    slots_T: Tensor

    @property
    def loss(self) -> float:
        """The weighted sum."""

    @property
    def is_forwarded(self) -> bool:
        """Whether all rows were."""


S = TypeVar("S", bound=StepSequence)


@dataclasses.dataclass
class _Totals:
    """Sums over the finished sequences of the step in work."""

    loss: float = 0.0
    num_correct: int = 0
    num_tokens: int = 0
    num_sequence_tokens: int = 0

    def add(self, sequence: StepSequence) -> None:
        self.loss += sequence.loss
        self.num_correct += sequence.num_correct
        self.num_tokens += sequence.num_tokens
        self.num_sequence_tokens += len(sequence.tokens)


class SteppedJob(abc.ABC, Generic[S]):
    """`step` is the next optimizer step's number, `group` the sequences in work, all of that step."""

    adapter: LoraAdapter | None = None
    """What its windows are forwarded under."""

    def __init__(self, job_id: str, decoder: Decoder, step: int, seed: int) -> None:
        self.job_id, self.step = job_id, step
        self.group: tuple[S, ...] = ()
        self._seed = seed
        self._decoder = decoder
        self._queue: deque[TrainingSlice] = deque()
        self._expected = (step, 0)
        self._totals = _Totals()

    @abc.abstractmethod
    def _sequence(self, item: TrainingSlice) -> S:
        """A slice whose work begins."""

    @abc.abstractmethod
    def _is_through(self) -> bool:
        """Whether nothing is to be done any more for the forwarded group. Raises TrainingDivergedError."""

    @abc.abstractmethod
    def _optimize(self, optimizer: OptimizerStep) -> float:
        """Take up the step's gradients; returns their norm. Raises TrainingDivergedError."""

    @abc.abstractmethod
    def checkpoint(self) -> bytes:
        """All that `restore` needs, before the step in work, as safetensors bytes."""

    @abc.abstractmethod
    def restore(self, data: bytes) -> None:
        """Take up the state that `checkpoint` wrote; only for a new job. Raises InvalidAdapterError if it does not fit."""

    @abc.abstractmethod
    def artifact(self) -> bytes:
        """What the job is for, as it is before the step in work: safetensors bytes."""

    def accept(self, item: TrainingSlice) -> bool:
        """Queue a slice; False for one that came before. Raises InvalidSliceError, OutOfOrderSliceError if one is missing."""
        key = (item.step, item.index)
        if key < self._expected:
            return False
        if key > self._expected:
            raise OutOfOrderSliceError(f"slice (step, index) {key} came, {self._expected} is next")
        check_slice(item, self._decoder)
        self._queue.append(item)
        self._expected = (item.step, item.index + 1) if item.optimizer is None else (item.step + 1, 0)
        return True

    def start_next(self, max_rows: int = MAX_GROUP_ROWS) -> tuple[S, ...]:
        """The group in work; if there was none, the next slices of the queue: one, or several with so many rows together."""
        if not self.group:
            group: list[S] = []
            while self._queue and self._joins(group, self._queue[0], max_rows):
                group.append(self._sequence(self._queue.popleft()))
            self.group = tuple(group)
        return self.group

    @property
    def is_forwarded(self) -> bool:
        """Whether a group is in work and can go backward."""
        return bool(self.group) and all(sequence.is_forwarded for sequence in self.group)

    def finish(self) -> GroupResult | None:
        """Take up the group's gradients once all of its sequences are through; may end a step. None if they are not yet.

        Raises TrainingDivergedError if the gradient is not finite: then the job is over.
        """
        if not self._is_through():
            return None
        group, self.group = self.group, ()
        for sequence in group:
            self._totals.add(sequence)
        optimizer = group[-1].item.optimizer
        return GroupResult(num_sequences=len(group), step=None if optimizer is None else self._end_step(optimizer))

    def _end_step(self, optimizer: OptimizerStep) -> StepResult:
        grad_norm = self._optimize(optimizer)
        totals, self._totals = self._totals, _Totals()
        self.step += 1
        return StepResult(step=self.step - 1, grad_norm=grad_norm, **dataclasses.asdict(totals))

    def _resume_at(self, step: int, seed: int) -> None:
        self.step, self._seed = step, seed
        self._expected = (step, 0)

    def _joins(self, group: Sequence[S], item: TrainingSlice, max_rows: int) -> bool:
        """Whether a slice is of the group's step and still fits in."""
        num_rows = sum(sequence.num_rows for sequence in group) + len(item.tokens)
        return not group or (item.step == group[0].item.step and num_rows <= max_rows)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingDivergedError(self.job_id, self.step, what, value)


def number(tensors: dict[str, Tensor], name: str, what: str) -> int:
    """A whole number of a checkpoint, which is taken out. Raises InvalidAdapterError without it."""
    value = tensors.pop(name, None)
    if value is None or value.numel() != 1:
        raise InvalidAdapterError(f"{what} has no {name}")
    return int(value)
