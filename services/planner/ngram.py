"""The n-gram drafter: a sequence goes on as it did where its last tokens occurred before. Knows tokens, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from services.planner.acceptance import Acceptance, bucket
from services.planner.drafter import DraftOrder, Key, Pool

LEVELS = (1, 2, 4)
"""Lengths of the n-grams that are indexed; longer matches are found among those of the last one."""
RECENCY = 0.9
"""A match weighs this much of the next more recent one of its length."""

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


@dataclasses.dataclass(slots=True)
class _Draft:
    """A pool with what is needed to judge it: the bucket of each node's children, by parent (-1: the root)."""

    pool: Pool
    buckets: dict[int, int]


@dataclasses.dataclass(slots=True)
class _Followed:
    index: NgramIndex
    draft: _Draft | None = None


class NgramDrafter:
    """Follows sequences by their n-grams; what it learns of acceptance is shared by all of them."""

    def __init__(
        self,
        acceptance: Acceptance,
        *,
        max_match: int = 16,
        num_matches: int = 8,
        match_weight: float = 2.0,
        min_prob: float = 0.02,
    ) -> None:
        """A match weighs `match_weight` times more than one a token shorter; nodes under `min_prob` are no candidates."""
        self._acceptance = acceptance
        self._max_match = max_match
        self._num_matches = num_matches
        self._weights = [match_weight**length for length in range(max_match + 1)]
        self._min_prob = min_prob
        self._followed: dict[Key, _Followed] = {}

    def open(self, key: Key, tokens: Sequence[int]) -> None:
        """See Drafter."""
        self._followed[key] = _Followed(NgramIndex(tokens))

    def extend(self, key: Key, tokens: Sequence[int]) -> None:
        """See Drafter."""
        followed = self._followed[key]
        if followed.draft is not None:
            self._judge(followed.draft, tokens)
            followed.draft = None
        followed.index.extend(tokens)

    def close(self, key: Key) -> None:
        """See Drafter."""
        self._followed.pop(key, None)

    def draft(self, orders: Sequence[DraftOrder], width: int) -> list[Pool]:
        """See Drafter."""
        return [self._draft(self._followed[order.key], order.depth, width) for order in orders]

    def _judge(self, draft: _Draft, truth: Sequence[int]) -> None:
        """Walk the draft along the committed tokens: each node that had children was continued rightly, or not."""
        pool, node = draft.pool, -1
        for token in truth:
            if node not in draft.buckets:
                return
            rest = range(node + 1, len(pool))
            child = next((i for i in rest if pool.parents[i] == node and pool.tokens[i] == token), None)
            self._acceptance.observe(draft.buckets[node], child is not None)
            if child is None:
                return
            node = child

    def _draft(self, followed: _Followed, depth: int, width: int) -> Pool:
        index = followed.index
        length, cursors = len(index.tokens), list[Cursor]()
        weight = 1.0
        for end, match_len in index.matches(self._num_matches, self._max_match):
            cursors.append((end + 1, length - end - 1, weight * self._weights[match_len], match_len))
            weight *= RECENCY
        followed.draft = self._grow(index.tokens, cursors, depth, width)
        return followed.draft.pool

    def _grow(self, tokens: list[int], cursors: list[Cursor], max_depth: int, width: int) -> _Draft:
        """Beam search over the continuations of the matches; one that reaches the end of the text starts again."""
        pool, buckets = Pool(), dict[int, int]()
        beams = [(-1, 1.0, cursors)] if cursors else []
        for depth in range(1, max_depth + 1):
            children: list[tuple[int, float, list[Cursor]]] = []
            for parent, prob, followers in beams:
                of = bucket(max(cursor[3] for cursor in followers), depth)
                buckets[parent] = of
                scale = prob * self._acceptance.rates[of] / sum(cursor[2] for cursor in followers)
                groups: dict[int, list[Cursor]] = {}
                for cursor in followers:
                    groups.setdefault(tokens[cursor[0] + (depth - 1) % cursor[1]], []).append(cursor)
                for token, group in groups.items():
                    path_prob = scale * sum(cursor[2] for cursor in group)
                    if path_prob >= self._min_prob:
                        children.append((len(pool.tokens), path_prob, group))
                        pool.tokens.append(token)
                        pool.parents.append(parent)
                        pool.depths.append(depth)
                        pool.probs.append(path_prob)
            beams = children if len(children) <= width else sorted(sorted(children, key=lambda beam: -beam[1])[:width])
        return _Draft(pool, buckets)
