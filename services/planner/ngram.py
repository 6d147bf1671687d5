"""The n-gram drafter: a sequence goes on as it did where its last tokens occurred before. Knows tokens, no model."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from services.planner.drafter import DraftOrder, Key, Pool

LEVELS = (1, 2, 4)
"""Lengths of the n-grams that are indexed; longer matches are found among those of the last one."""
RECENCY = 0.9
"""A match weighs this much of the next more recent one of its length."""
MIN_FOREIGN_MATCH = 2
"""A single token that another text has too tells little."""
END = -1
"""Behind each text of the traffic: no token, so no match reaches across."""
MATCH_EDGES = (2, 3, 4, 6, 9, 14)
"""Match lengths 1, 2, 3, 4-5, 6-8, 9-13 and 14 or more are told apart."""
MATCH_MEANS = (0.35, 0.5, 0.55, 0.65, 0.85, 0.9, 0.95)
DEEPER_GAIN = 0.35

Cursor = tuple[list[int], int, int, float, int]
"""A match: the text it is in, where its continuation starts, that continuation's period (0: it ends), its weight and length."""


class NgramIndex:
    """The tokens of a sequence, and for each position the previous one that ends the same n-gram.

    Appending a token costs O(1) per level, and so does finding the latest earlier occurrence of the last n-gram. A suffix
    automaton knows one occurrence of each suffix, the longest among them; several of one length guess better together.
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

    def matches_of(self, tail: Sequence[int], limit: int, max_match: int) -> list[tuple[int, int]]:
        """The same for the last tokens of another text."""
        found: dict[int, int] = {}
        for level, latest, previous in zip(reversed(LEVELS), reversed(self._latest), reversed(self._previous), strict=True):
            end = latest.get(tuple(tail[-level:]), -1)
            while end >= 0 and len(found) < limit:
                if end not in found:
                    found[end] = _common_len(self.tokens, end, tail, len(tail) - 1, level, max_match)
                end = previous[end]
        return list(found.items())

    def _match_len(self, end: int, last: int, known: int, max_match: int) -> int:
        return _common_len(self.tokens, end, self.tokens, last, known, max_match)


def _common_len(text: Sequence[int], end: int, tail: Sequence[int], last: int, known: int, most: int) -> int:
    """How many tokens up to `end` are those up to `last`, at most `most`; `known` of them are."""
    most = min(most, end + 1, last + 1)
    while known < most and text[end - known] == tail[last - known]:
        known += 1
    return known


class Traffic:
    """What was lately served, by tenant; of all tenants together at most `max_tokens`, the least recently used forgotten first.

    Each tenant has two indices: one grows, the one before it goes when that is full.
    """

    def __init__(self, max_tokens: int) -> None:
        self._full = max_tokens // 4
        self._max_tokens = max_tokens
        self._by_tenant: OrderedDict[str, list[NgramIndex]] = OrderedDict()
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_tokens

    def of(self, tenant: str) -> Sequence[NgramIndex]:
        """The tenant's indices, the latest first."""
        return self._by_tenant.get(tenant, ())

    def add(self, tenant: str, tokens: Sequence[int]) -> None:
        """A text of this tenant ended; of a long one its end counts."""
        kept = tokens[-self._full :] if self._full else ()
        if not kept:
            return
        indices = self._by_tenant.setdefault(tenant, [])
        self._by_tenant.move_to_end(tenant)
        if not indices or len(indices[0].tokens) + len(kept) + 1 > self._full + 1:
            indices.insert(0, NgramIndex())
        indices[0].extend([*kept, END])
        self._num_tokens += len(kept) + 1
        for gone in indices[2:]:
            self._num_tokens -= len(gone.tokens)
        del indices[2:]
        while self._num_tokens > self._max_tokens:
            oldest, its = next(iter(self._by_tenant.items()))
            self._num_tokens -= len(its.pop().tokens)
            if not its:
                del self._by_tenant[oldest]


def belief(match_len: int, depth: int) -> float:
    """How often a guess that rests on a match of this length is right: measured on greedy answers of SmolLM2-135M-Instruct to
    code, chat and summary prompts. The error shrinks once a path was right so far.
    """
    mean = MATCH_MEANS[bisect_right(MATCH_EDGES, match_len)]
    return mean if depth == 1 else 1.0 - (1.0 - mean) * (1.0 - DEEPER_GAIN)


class NgramDrafter:
    """Follows sequences by their n-grams, and by those of what was lately served to the same tenant."""

    is_free = True

    def __init__(
        self,
        *,
        max_match: int = 16,
        num_matches: int = 8,
        match_weight: float = 2.0,
        min_prob: float = 0.02,
        traffic: Traffic | None = None,
    ) -> None:
        """A match weighs `match_weight` times more than one a token shorter; nodes under `min_prob` are no candidates."""
        self._max_match = max_match
        self._num_matches = num_matches
        self._weights = [match_weight**length for length in range(max_match + 1)]
        self._min_prob = min_prob
        self._traffic = traffic
        self._followed: dict[Key, tuple[NgramIndex, str]] = {}

    def open(self, key: Key, tokens: Sequence[int], *, tenant: str = "", features: bytes = b"") -> None:
        """See Drafter."""
        self._followed[key] = (NgramIndex(tokens), tenant)

    def extend(self, key: Key, tokens: Sequence[int], *, features: bytes = b"") -> None:
        """See Drafter."""
        self._followed[key][0].extend(tokens)

    def close(self, key: Key) -> None:
        """See Drafter; the sequence's text is traffic of its tenant from now on."""
        followed = self._followed.pop(key, None)
        if followed is not None and self._traffic is not None:
            self._traffic.add(followed[1], followed[0].tokens)

    def draft(self, orders: Sequence[DraftOrder]) -> list[Pool]:
        """See Drafter."""
        return [self._draft(*self._followed[order.key], order.depth, order.width) for order in orders]

    def _draft(self, index: NgramIndex, tenant: str, depth: int, width: int) -> Pool:
        length, cursors = len(index.tokens), list[Cursor]()
        weight = 1.0
        for end, match_len in index.matches(self._num_matches, self._max_match):
            cursors.append((index.tokens, end + 1, length - end - 1, weight * self._weights[match_len], match_len))
            weight *= RECENCY
        for other in self._traffic.of(tenant) if self._traffic is not None else ():
            for end, match_len in other.matches_of(index.tokens[-self._max_match :], self._num_matches, self._max_match):
                if match_len >= MIN_FOREIGN_MATCH:
                    cursors.append((other.tokens, end + 1, 0, weight * self._weights[match_len], match_len))
                    weight *= RECENCY
        return self._grow(cursors, depth, width)

    def _grow(self, cursors: list[Cursor], max_depth: int, width: int) -> Pool:
        """Beam search over the continuations of the matches; one that reaches the end of its own text starts again."""
        pool = Pool()
        beams = [(-1, 1.0, cursors)] if cursors else []
        for depth in range(1, max_depth + 1):
            children: list[tuple[int, float, list[Cursor]]] = []
            for parent, prob, followers in beams:
                rate = belief(max(cursor[4] for cursor in followers), depth)
                scale = prob * rate / sum(cursor[3] for cursor in followers)
                groups: dict[int, list[Cursor]] = {}
                for cursor in followers:
                    text, start, period, _, _ = cursor
                    at = start + ((depth - 1) % period if period else depth - 1)
                    groups.setdefault(text[at] if at < len(text) else END, []).append(cursor)
                for token, group in groups.items():
                    path_prob = scale * sum(cursor[3] for cursor in group)
                    if token != END and path_prob >= self._min_prob:
                        children.append((pool.add(token, parent, depth, path_prob), path_prob, group))
            beams = children if len(children) <= width else sorted(sorted(children, key=lambda beam: -beam[1])[:width])
        return pool
