"""Windows of training in a pass, and what came of passes: steps, scores, failures, costs. Knows no job's inside and no page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from common.latency import Rows, backward_corrected, corrected, drafter_corrected
from common.messages import LatencyProfile
from services.executor.batch import Segment
from services.executor.evaluation import EvaluationWindow, Score
from services.executor.job_steps import StepResult
from services.executor.lesson import LessonSequence
from services.executor.training_sequence import TrainingSequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingEvent:
    """A finished optimizer step, an evaluated sequence, or (`failure`) the end of a job that cannot go on."""

    job_id: str
    lease: int
    step: StepResult | None = None
    elapsed_ms: float = 0.0
    score: Score | None = None
    failure: str = ""


class UnitWork(NamedTuple):
    """What windows did that go forward in units: whole-model token equivalents, ms, and each pass that went in one go."""

    num_tokens: float = 0.0
    ms: float = 0.0
    passed: tuple[tuple[Rows, float], ...] = ()
    """Its rows, and the ms that it took."""
    num_lacking: int = 0
    """Rows of a pass that memory was too short for: its windows begin again, fewer at a time."""


NO_UNITS = UnitWork()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardWork:
    """What a backward pass did, in whole-model token equivalents, and the steps that it ended.

    Drafters' training is apart: in tokens of a forward pass, and the time that it took. So are windows that went forward in
    units.
    """

    num_tokens: float = 0.0
    events: tuple[TrainingEvent, ...] = ()
    drafter_tokens: float = 0.0
    drafter_ms: float = 0.0
    units: UnitWork = NO_UNITS

    @property
    def is_any(self) -> bool:
        """Whether something was done."""
        return bool(self.num_tokens or self.drafter_tokens or self.units.num_tokens)

    def learned(self, profile: LatencyProfile, elapsed_ms: float) -> LatencyProfile:
        """The profile, now that all of it took so long."""
        profile = drafter_corrected(profile, self.drafter_tokens, self.drafter_ms)
        for rows, ms in self.units.passed:
            profile = corrected(profile, rows, ms)
        return backward_corrected(profile, self.num_tokens, elapsed_ms - self.drafter_ms - self.units.ms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Rows of a job's sequence that ride in one forward pass."""

    job_id: str
    sequence: TrainingSequence | LessonSequence
    start: int
    segment: Segment


def layers_of(windows: Sequence[Window | EvaluationWindow]) -> set[int]:
    """The layers whose states these windows are forwarded for."""
    return {layer for each in windows if isinstance(each.sequence, LessonSequence) for layer in each.sequence.layers}
