"""What drafting costs: so much for a level, so much for a row in it, as measured lately. Pure; knows no drafter, no clock."""

from __future__ import annotations

from collections.abc import Sequence

LEVEL_MS, ROW_MS = 1.0, 0.2
"""What is believed before there is evidence: a small head on one core of a CPU."""
PRIOR_WEIGHT = 2.0
"""Drafts that this belief counts for, each of one level and of ten rows."""
PRIOR_ROWS = 10
FORGETTING = 0.97
"""A measured draft counts e times less after thirty more."""
MAX_SURPRISE = 3.0
"""A draft that took more times what was predicted was held up by something else, and counts as this much."""

DEVIATIONS = 2.0
"""Drafts are cut so that one which takes so many mean deviations longer than predicted still comes in time."""

Limits = Sequence[tuple[int, int]]
"""Depth and width of each request's draft."""


def rows_of(limits: Limits) -> int:
    """Rows that drafters compute at most: each request's root, and on each further level its width."""
    return sum(1 + (depth - 1) * width for depth, width in limits if depth > 0)


class DraftCost:
    """Least squares over drafts of ms = level_ms * levels + row_ms * rows, the latest ones weighing most."""

    def __init__(self) -> None:
        self._levels_levels = PRIOR_WEIGHT
        self._levels_rows = 0.0
        self._rows_rows = PRIOR_WEIGHT * PRIOR_ROWS**2
        self._levels_ms = PRIOR_WEIGHT * LEVEL_MS
        self._rows_ms = PRIOR_WEIGHT * PRIOR_ROWS**2 * ROW_MS
        self.level_ms, self.row_ms = LEVEL_MS, ROW_MS
        self.deviation_ms = 0.0
        """How far drafts were from what was predicted, lately and in the mean."""

    def observe(self, levels: int, rows: int, ms: float) -> None:
        """A draft of so many levels and rows took so long."""
        if levels <= 0:
            return
        expected = self.of(levels, rows)
        ms = min(ms, MAX_SURPRISE * expected + LEVEL_MS)
        self.deviation_ms = FORGETTING * self.deviation_ms + (1.0 - FORGETTING) * abs(ms - expected)
        self._levels_levels = FORGETTING * self._levels_levels + levels * levels
        self._levels_rows = FORGETTING * self._levels_rows + levels * rows
        self._rows_rows = FORGETTING * self._rows_rows + rows * rows
        self._levels_ms = FORGETTING * self._levels_ms + levels * ms
        self._rows_ms = FORGETTING * self._rows_ms + rows * ms
        self._solve()

    def of(self, levels: int, rows: int) -> float:
        """Predicted ms."""
        return self.level_ms * levels + self.row_ms * rows

    def affordable(self, limits: Limits, patience_ms: float, deviations: float = DEVIATIONS) -> list[tuple[int, int]]:
        """The limits, cut so that drafts come in time: first no request drafts wider than need be, then none so deep."""
        fitting, left_ms = list(limits), patience_ms - deviations * self.deviation_ms
        widest, deepest = max((w for _, w in fitting), default=1), max((d for d, _ in fitting), default=0)
        while self.of(deepest, rows_of(fitting)) > left_ms and (widest > 1 or deepest > 1):
            if widest > 1:
                widest -= 1
            else:
                deepest -= 1
            fitting = [(min(depth, deepest), min(width, widest)) for depth, width in fitting]
        return fitting

    def _solve(self) -> None:
        """Neither cost is below zero: what would be is none, and the other bears all."""
        determinant = self._levels_levels * self._rows_rows - self._levels_rows**2
        level_ms, row_ms = -1.0, 0.0
        if determinant > 1e-6 * self._levels_levels * self._rows_rows:
            level_ms = (self._levels_ms * self._rows_rows - self._rows_ms * self._levels_rows) / determinant
            row_ms = (self._rows_ms * self._levels_levels - self._levels_ms * self._levels_rows) / determinant
        if level_ms < 0.0:
            level_ms, row_ms = 0.0, self._rows_ms / self._rows_rows
        elif row_ms < 0.0:
            level_ms, row_ms = self._levels_ms / self._levels_levels, 0.0
        self.level_ms, self.row_ms = level_ms, row_ms
