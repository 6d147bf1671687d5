"""Windows of training in a pass, and what came of passes: steps, scores, failures, costs. Knows no job's inside and no page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from common.latency import backward_corrected, drafter_corrected
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardWork:
    """What a backward pass did, in whole-model token equivalents, and the steps that it ended.

    Drafters' training is apart: in tokens of a forward pass, and the time that it took.
    """

    num_tokens: float = 0.0
    events: tuple[TrainingEvent, ...] = ()
    drafter_tokens: float = 0.0
    drafter_ms: float = 0.0

    @property
    def is_any(self) -> bool:
        """Whether something was done."""
        return bool(self.num_tokens or self.drafter_tokens)

    def learned(self, profile: LatencyProfile, elapsed_ms: float) -> LatencyProfile:
        """The profile, now that all of it took so long."""
        profile = drafter_corrected(profile, self.drafter_tokens, self.drafter_ms)
        return backward_corrected(profile, self.num_tokens, elapsed_ms - self.drafter_ms)


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
