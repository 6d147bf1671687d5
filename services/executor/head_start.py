"""The first steps of a distillation: sums over their texts' rows, and from these the head's first weights. Knows no budget.

Sums of the step in work are apart until it ends, so that a checkpoint holds whole steps. The map for the head's own outputs is
that of the last layer's features, which outputs stand for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.drafting.head import DraftHead
from kernels.drafting.start import LeastSquares, Solution, fit_rows, start_from_maps
from services.executor.lesson import LessonSequence
from services.executor.lesson_units import READ_ROWS, UPDATE_COST, Unit

MAX_INPUTS = 6144
"""Of a wider head the sums and their solution would take more memory and time than they are worth: it starts without."""


def is_narrow(head: DraftHead) -> bool:
    """Whether sums over its inputs are affordable."""
    return head.shape.hidden_size * (1 + len(head.shape.feature_layers)) <= MAX_INPUTS


class HeadStart:
    """Sums of the steps done (`sums`) and of the step in work."""

    def __init__(self, head: DraftHead) -> None:
        hidden = head.shape.hidden_size
        num_inputs, device = hidden * (1 + len(head.shape.feature_layers)), head.features.weight.device
        self.sums, self._new = (LeastSquares.empty(num_inputs, hidden, device) for _ in range(2))
        self._head = head
        self._sample_RI: Tensor | None = None

    def units(self, sequence: LessonSequence) -> Iterator[Unit]:
        """Take a text's rows into the sums; its first row is no other's."""
        for start in range(1, sequence.num_rows - 1, READ_ROWS):
            end = min(start + READ_ROWS, sequence.num_rows - 1)
            cost = (end - start) * (self.sums.gram_II.numel() + self.sums.moment_IO.numel())
            yield Unit(cost, lambda start=start, end=end: self._add(sequence, start, end))  # type: ignore[misc]

    def end_step(self, *, is_last: bool) -> Iterator[Unit]:
        """The step is through; after the last one, set the head. What a checkpoint holds changes in the last unit alone."""
        cost = UPDATE_COST * (self.sums.gram_II.numel() + self.sums.moment_IO.numel())
        if not is_last or self._sample_RI is None:
            yield Unit(cost, lambda: self.sums.take(self._new))
            return
        solutions: list[Solution] = []
        yield Unit(2 * cost, lambda: solutions.extend(self._solutions()))
        for solution in solutions:
            for part_cost, run in solution.parts():
                yield Unit(part_cost, run)
        sample_RI, (first, again) = self._sample_RI, solutions
        cost = sample_RI.numel() * first.map_IO.shape[1]
        yield Unit(cost, lambda: start_from_maps(self._head, first.map_IO, again.map_IO, sample_RI))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"gram": self.sums.gram_II, "moment": self.sums.moment_IO}

    def _add(self, sequence: LessonSequence, start: int, end: int) -> None:
        with torch.no_grad():
            rows = fit_rows(self._head, sequence.features_TF[start : end + 1], sequence.places_T[start + 1 : end + 1])
            self._new.add(*rows)
        self._sample_RI = rows[0]

    def _solutions(self) -> tuple[Solution, Solution]:
        """For the target's features, and for own outputs."""
        for new, done in zip(self._new, self.sums, strict=True):
            new += done  # which stay until the step has ended
        hidden, num_inputs = self._head.shape.hidden_size, len(self._new.gram_II)
        chosen_I = torch.cat([torch.arange(hidden), torch.arange(num_inputs - hidden, num_inputs)])
        again = Solution(self._new.of_inputs(chosen_I.to(self._new.gram_II.device)))
        return Solution(self._new), again
