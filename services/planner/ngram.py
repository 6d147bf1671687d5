"""The n-gram drafter: a sequence goes on as it did where its last tokens occurred before. Knows tokens, no model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from services.planner.drafter import DraftOrder, Key, Pool

LEVELS = (1, 2, 4)
"""Lengths of the n-grams that are indexed; longer matches are found among those of the last one."""
RECENCY = 0.9
"""A match weighs this much of the next more recent one of its length."""
MATCH_EDGES = (2, 3, 4, 6, 9, 14)
"""Match lengths 1, 2, 3, 4-5, 6-8, 9-13 and 14 or more are told apart."""
MATCH_MEANS = (0.35, 0.5, 0.55, 0.65, 0.85, 0.9, 0.95)
DEEPER_GAIN = 0.35

Cursor = tuple[int, int, float, int]
"""A match: where its continuation starts, that continuation's period, its weight, the match's length."""


class NgramIndex:
    """The tokens of a sequence, and for each position the previous one that ends the same n-gram.

    Appending a token costs O(1) per level, and so does finding the latest earlier occurrence of the last n-gram.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._latest: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in LEVELS)
        self._previous: tuple[list[int], ...] = tuple([-1] * (level - 1) for level in LEVELS)
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        self.tokens.extend(tokens)
        for level, latest, previous in zip(LEVELS, self._latest, self._previous, strict=True):
            first = len(previous) + 1 - level
            grams = zip(*(self.tokens[first + i :] for i in range(level)), strict=False)
            for end, gram in enumerate(grams, len(previous)):
                previous.append(latest.get(gram, -1))
                latest[gram] = end

    def matches(self, limit: int, max_match: int) -> list[tuple[int, int]]:
        """Up to `limit` earlier (end, length) of the sequence's last tokens: long ones first, then recent ones first."""
        last = len(self.tokens) - 1
        found: dict[int, int] = {}
        for level, previous in zip(reversed(LEVELS), reversed(self._previous), strict=True):
            end = previous[last] if last >= 0 else -1
            while end >= 0 and len(found) < limit:
                if end not in found:
                    found[end] = self._match_len(end, last, level, max_match)
                end = previous[end]
        return list(found.items())

    def _match_len(self, end: int, last: int, known: int, max_match: int) -> int:
        tokens, length = self.tokens, known
        while length < max_match and end >= length and tokens[end - length] == tokens[last - length]:
            length += 1
        return length


def belief(match_len: int, depth: int) -> float:
    """How often a guess that rests on a match of this length is right: measured on greedy answers of SmolLM2-135M-Instruct to
    code, chat and summary prompts. The error shrinks once a path was right so far.
    """
    mean = MATCH_MEANS[bisect_right(MATCH_EDGES, match_len)]
    return mean if depth == 1 else 1.0 - (1.0 - mean) * (1.0 - DEEPER_GAIN)


class NgramDrafter:
    """Follows sequences by their n-grams."""

    def __init__(self, *, max_match: int = 16, num_matches: int = 8, match_weight: float = 2.0, min_prob: float = 0.02) -> None:
        """A match weighs `match_weight` times more than one a token shorter; nodes under `min_prob` are no candidates."""
        self._max_match = max_match
        self._num_matches = num_matches
        self._weights = [match_weight**length for length in range(max_match + 1)]
        self._min_prob = min_prob
        self._followed: dict[Key, NgramIndex] = {}

    def open(self, key: Key, tokens: Sequence[int], *, tenant: str = "", features: bytes = b"") -> None:
        """See Drafter."""
        self._followed[key] = NgramIndex(tokens)

    def extend(self, key: Key, tokens: Sequence[int], *, features: bytes = b"") -> None:
        """See Drafter."""
        self._followed[key].extend(tokens)

    def close(self, key: Key) -> None:
        """See Drafter."""
        self._followed.pop(key, None)

    def draft(self, orders: Sequence[DraftOrder], width: int) -> list[Pool]:
        """See Drafter."""
        return [self._draft(self._followed[order.key], order.depth, width) for order in orders]

    def _draft(self, index: NgramIndex, depth: int, width: int) -> Pool:
        length, cursors = len(index.tokens), list[Cursor]()
        weight = 1.0
        for end, match_len in index.matches(self._num_matches, self._max_match):
            cursors.append((end + 1, length - end - 1, weight * self._weights[match_len], match_len))
            weight *= RECENCY
        return self._grow(index.tokens, cursors, depth, width)

    def _grow(self, tokens: list[int], cursors: list[Cursor], max_depth: int, width: int) -> Pool:
        """Beam search over the continuations of the matches; one that reaches the end of the text starts again."""
        pool = Pool()
        beams = [(-1, 1.0, cursors)] if cursors else []
        for depth in range(1, max_depth + 1):
            children: list[tuple[int, float, list[Cursor]]] = []
            for parent, prob, followers in beams:
                rate = belief(max(cursor[3] for cursor in followers), depth)
                scale = prob * rate / sum(cursor[2] for cursor in followers)
                groups: dict[int, list[Cursor]] = {}
                for cursor in followers:
                    groups.setdefault(tokens[cursor[0] + (depth - 1) % cursor[1]], []).append(cursor)
                for token, group in groups.items():
                    path_prob = scale * sum(cursor[2] for cursor in group)
                    if path_prob >= self._min_prob:
                        children.append((pool.add(token, parent, depth, path_prob), path_prob, group))
            beams = children if len(children) <= width else sorted(sorted(children, key=lambda beam: -beam[1])[:width])
        return pool
