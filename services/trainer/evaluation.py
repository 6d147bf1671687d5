"""The mean of a validation file's scores as they come in, in any order and perhaps twice. Pure; knows no executor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from common.messages import SequenceEvaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over all trained tokens of the validation file."""

    loss: float
    token_accuracy: float
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """In OpenAI's words."""
        return {"full_valid_loss": self.loss, "full_valid_mean_token_accuracy": self.token_accuracy}


class Scores:
    """What is known of the sequences 0 to `num_sequences` - 1 before `step`."""

    def __init__(self, step: int, num_sequences: int) -> None:
        self._step = step
        self._num_sequences = num_sequences
        self._known: dict[int, SequenceEvaluated] = {}

    def take(self, score: SequenceEvaluated) -> None:
        """Remember one; one of another step is nothing to us."""
        if score.step == self._step and 0 <= score.index < self._num_sequences:
            self._known[score.index] = score

    def missing(self) -> list[int]:
        """Sequences without a score, in order."""
        return [index for index in range(self._num_sequences) if index not in self._known]

    def num_pending(self, unsent: Collection[int]) -> int:
        """Sequences that were sent and have no score."""
        return self._num_sequences - len(self._known) - sum(index not in self._known for index in unsent)

    def mean(self) -> Evaluation:
        """Of all sequences; the same in whatever order they came."""
        scores = [self._known[index] for index in range(self._num_sequences)]
        num_tokens = max(1, sum(score.num_tokens for score in scores))
        return Evaluation(
            loss=math.fsum(score.loss for score in scores) / num_tokens,
            token_accuracy=sum(score.num_correct for score in scores) / num_tokens,
            num_tokens=num_tokens,
        )
