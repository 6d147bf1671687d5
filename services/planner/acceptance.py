"""How often a draft is right: a rate per (match length, depth), learned from what the target accepted. Knows no tokens."""

from __future__ import annotations

from bisect import bisect_right

MATCH_EDGES = (2, 3, 4, 6, 9, 14)
"""Match lengths 1, 2, 3, 4-5, 6-8, 9-13 and 14 or more are told apart."""
DEPTH_EDGES = (2, 3, 5, 9)
"""Depths 1, 2, 3-4, 5-8 and 9 or more are told apart."""
PRIOR_MEANS = (0.35, 0.5, 0.55, 0.65, 0.85, 0.9, 0.95)
"""Prior rate per match bucket: measured on greedy answers of SmolLM2-135M-Instruct to code, chat and summary prompts."""
DEEPER_GAIN = 0.35
"""Prior: the error rate shrinks by this share once a path was right so far."""
MAX_RATE = 0.99
"""No rate reaches 1, so that probabilities fall along every path."""

_MATCH_BUCKETS = tuple(bisect_right(MATCH_EDGES, length) for length in range(MATCH_EDGES[-1] + 1))
_DEPTH_BUCKETS = tuple(bisect_right(DEPTH_EDGES, depth) for depth in range(DEPTH_EDGES[-1] + 1))


def bucket(match_len: int, depth: int) -> int:
    """The bucket of a guess at this depth that rests on a match of this length."""
    of_match = _MATCH_BUCKETS[min(match_len, len(_MATCH_BUCKETS) - 1)]
    return of_match * (len(DEPTH_EDGES) + 1) + _DEPTH_BUCKETS[min(depth, len(_DEPTH_BUCKETS) - 1)]


class Acceptance:
    """Beta estimates with exponential forgetting: rate = (prior hits + hits) / (prior trials + trials)."""

    def __init__(self, *, prior_trials: float = 8.0, forgetting: float = 0.998, is_frozen: bool = False) -> None:
        """An observation counts e times less after 1 / (1 - forgetting) more of its bucket; frozen, none counts."""
        self._is_frozen = is_frozen
        self._prior_trials = prior_trials
        self._forgetting = forgetting
        self._priors = [
            mean if depth == 0 else 1 - (1 - mean) * (1 - DEEPER_GAIN)
            for mean in PRIOR_MEANS
            for depth in range(len(DEPTH_EDGES) + 1)
        ]
        self._hits = [0.0] * len(self._priors)
        self._trials = [0.0] * len(self._priors)
        self.rates = [min(MAX_RATE, prior) for prior in self._priors]
        """The estimate per bucket, in (0, 1)."""

    def observe(self, of: int, is_hit: bool) -> None:
        """A node of this bucket had children, its own path was accepted, and the next token was among them, or not."""
        if self._is_frozen:
            return
        self._hits[of] = self._hits[of] * self._forgetting + is_hit
        self._trials[of] = self._trials[of] * self._forgetting + 1.0
        hits = self._prior_trials * self._priors[of] + self._hits[of]
        self.rates[of] = min(MAX_RATE, hits / (self._prior_trials + self._trials[of]))
