"""How often drafted tokens are right, against how probable their drafter said they are. Knows numbers, no tokens, no trees."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

PROB_EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
"""Probabilities between two edges are corrected together: narrow where odds change fast."""
DEPTH_EDGES = (2, 3, 5, 9)
"""Depths 1, 2, 3-4, 5-8 and 9 or more are told apart."""
MIN_PROB = 1e-4
MAX_PROB = 0.99
"""Nothing is impossible or certain: corrections stay finite, and probabilities fall along every path."""
PRIOR_TRIALS = 8.0
"""An uncorrected probability counts as much as so many observations; so does the correction for all depths at each depth."""

_NUM_BINS = len(PROB_EDGES) + 1
_DEPTH_BUCKETS = tuple(bisect_right(DEPTH_EDGES, depth) for depth in range(DEPTH_EDGES[-1] + 1))


def clamp(prob: float) -> float:
    """The nearest probability that the tables work with."""
    return min(MAX_PROB, max(MIN_PROB, prob))


class _Cell:
    """Observations of one kind: exponentially forgotten counts, and the mean of what was predicted."""

    __slots__ = ("hits", "predicted", "trials")

    def __init__(self) -> None:
        self.hits = self.predicted = self.trials = 0.0

    def observe(self, prob: float, is_hit: bool, forgetting: float) -> None:
        self.hits = self.hits * forgetting + is_hit
        self.predicted = self.predicted * forgetting + prob
        self.trials = self.trials * forgetting + 1.0

    def factor(self, prior: float) -> float:
        """Observed odds over predicted odds, starting from `prior`."""
        if not self.trials:
            return prior
        mean = self.predicted / self.trials
        rate = clamp((self.hits + PRIOR_TRIALS * corrected(mean, prior)) / (self.trials + PRIOR_TRIALS))
        return rate * (1.0 - mean) / ((1.0 - rate) * mean)


def corrected(prob: float, factor: float) -> float:
    """The probability whose odds are `factor` times those of `prob`."""
    return prob * factor / (1.0 - prob + prob * factor)


class Calibration:
    """Corrections of the odds of conditional probabilities: a factor per (depth, probability), learned from what was accepted.

    Within one kind the order of probabilities stays. A depth that was rarely seen takes after all depths together.
    """

    def __init__(self, *, forgetting: float, is_frozen: bool = False) -> None:
        """An observation counts e times less after 1 / (1 - forgetting) more of its kind; frozen, none counts."""
        self._forgetting = forgetting
        self._is_frozen = is_frozen
        num_depths = len(DEPTH_EDGES) + 1
        self._all_depths = [_Cell() for _ in range(_NUM_BINS)]
        self._cells = [[_Cell() for _ in range(num_depths)] for _ in range(_NUM_BINS)]
        self._factors = [[1.0] * num_depths for _ in range(_NUM_BINS)]

    def probability(self, prob: float, depth: int) -> float:
        """What `prob`, of a token at this depth given that its ancestors are right, turned out to mean. In (0, 1)."""
        prob = MAX_PROB if prob > MAX_PROB else MIN_PROB if prob < MIN_PROB else prob
        factor = self._factors[bisect_right(PROB_EDGES, prob)][_DEPTH_BUCKETS[depth] if depth < 9 else -1]
        prob = prob * factor / (1.0 - prob + prob * factor)
        return MAX_PROB if prob > MAX_PROB else MIN_PROB if prob < MIN_PROB else prob

    def observe(self, prob: float, depth: int, is_hit: bool) -> None:
        """A token of this probability, whose ancestors were right, was right or not."""
        if self._is_frozen:
            return
        prob = clamp(prob)
        at, level = bisect_right(PROB_EDGES, prob), _DEPTH_BUCKETS[min(depth, len(_DEPTH_BUCKETS) - 1)]
        self._cells[at][level].observe(prob, is_hit, self._forgetting)
        self._all_depths[at].observe(prob, is_hit, self._forgetting)
        shared = self._all_depths[at].factor(1.0)
        self._factors[at] = [cell.factor(shared) for cell in self._cells[at]]


class Reliability:
    """Expected calibration error: mean distance of predicted from observed frequency, over bins of the prediction."""

    def __init__(self, *, num_bins: int = 10, forgetting: float = 0.9995) -> None:
        self._cells = [_Cell() for _ in range(num_bins)]
        self._forgetting = forgetting

    def observe(self, probs: Sequence[float], hits: Sequence[bool]) -> None:
        """Nodes of these path probabilities were verified, and accepted or not."""
        keep = self._forgetting ** len(probs)
        for cell in self._cells:
            cell.hits, cell.predicted, cell.trials = cell.hits * keep, cell.predicted * keep, cell.trials * keep
        for prob, is_hit in zip(probs, hits, strict=True):
            self._cells[min(int(prob * len(self._cells)), len(self._cells) - 1)].observe(prob, is_hit, 1.0)

    @property
    def error(self) -> float:
        """In [0, 1]; 0 before anything was verified."""
        trials = sum(cell.trials for cell in self._cells)
        return sum(abs(cell.predicted - cell.hits) for cell in self._cells) / trials if trials else 0.0
