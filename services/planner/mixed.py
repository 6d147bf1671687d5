"""Several drafters as one: their pools merged into one trie, their probabilities calibrated. Knows no drafter's method."""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from itertools import groupby

from services.planner.calibration import MAX_PROB, Calibration, Reliability
from services.planner.drafter import Drafter, DraftOrder, FeatureNeed, Key, Pool
from services.planner.pacing import Tier

SURE = 0.5
"""Where a drafter that costs nothing is so sure of the next token, those that compute a model are not asked besides."""
SILENT, DISSENTS, NAMES = 0, 1, 2
"""What a drafter says of a node: nothing of its siblings either; only siblings; the node itself."""


@dataclasses.dataclass(slots=True)
class _Evidence:
    """Why a node is as probable as it is: what each drafter said of it, and what that meant to their mix."""

    said: list[float | None]
    """Conditional probability by drafter."""
    mix: int = 0
    pooled: float = 0.0


@dataclasses.dataclass(slots=True)
class _Draft:
    """A pool until the target has judged it; `chosen` are the nodes that were sent to it."""

    pool: Pool
    evidence: list[_Evidence]
    chosen: Sequence[int] = ()


class MixedDrafter:
    """Drafts with one or several drafters. The same path from two of them is one node.

    A node's conditional probability is corrected twice: each drafter's by its depth, and, where there are several, their
    noisy-or by who named the node, who named only others, and the depth.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        forgetting: float = 0.998,
        is_frozen: bool = False,
        need: FeatureNeed | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`forgetting` as in Calibration; frozen, probabilities stay as the drafters believe them. `clock` is in seconds."""
        self._clock = clock
        self.need = need
        """Of one of the drafters."""
        self.is_free = all(drafter.is_free for drafter in drafters)
        self.has_free = any(drafter.is_free for drafter in drafters)
        self.has_tiers = self.has_free and not self.is_free
        """Whether some drafters cost next to nothing, and some do not."""
        self.computed: list[Pool] = []
        """Of the last draft what took its time: the pools of drafters that compute a model, if any was asked, or else all."""
        self.computed_ms = 0.0
        """How long these took."""
        self._drafters = tuple(drafters)
        self._own = [Calibration(forgetting=forgetting, is_frozen=is_frozen) for _ in drafters]
        self._mixes = [Calibration(forgetting=forgetting, is_frozen=is_frozen) for _ in range(3 ** len(drafters))]
        self._open: dict[Key, _Draft | None] = {}
        self.reliability = Reliability()
        """Of the path probabilities of chosen nodes."""

    def open(self, key: Key, tokens: Sequence[int], *, tenant: str = "", features: bytes = b"") -> None:
        """See Drafter."""
        for drafter in self._drafters:
            drafter.open(key, tokens, tenant=tenant, features=features)
        self._open[key] = None

    def extend(self, key: Key, tokens: Sequence[int], *, features: bytes = b"") -> None:
        """See Drafter; the tokens also judge the last draft."""
        if (draft := self._open[key]) is not None:
            self._judge(draft, tokens)
            self._open[key] = None
        for drafter in self._drafters:
            drafter.extend(key, tokens, features=features)

    def close(self, key: Key) -> None:
        """See Drafter."""
        if key in self._open:
            del self._open[key]
            for drafter in self._drafters:
                drafter.close(key)

    def draft(
        self,
        orders: Sequence[DraftOrder],
        tier: Tier = "all",
        costly: Sequence[DraftOrder] | None = None,
        needy: Collection[int] = (),
    ) -> list[Pool]:
        """See Drafter; who does not belong to the tier has nothing to say. `costly` are orders of their own, of the same
        sequences, for drafters that compute a model; these are then not asked where others are SURE, except for `needy` ones.
        """
        by_drafter: dict[int, list[Pool]] = {}
        self.computed, self.computed_ms, free_ms = [], 0.0, 0.0
        asked = list(costly or orders) if tier == "all" else []
        for i, drafter in sorted(enumerate(self._drafters), key=lambda each: not each[1].is_free):
            started_at = self._clock()
            if drafter.is_free:
                by_drafter[i] = drafter.draft(orders)
                free_ms += 1e3 * (self._clock() - started_at)
                for place, pool in enumerate(by_drafter[i] if asked and costly else []):
                    if place not in needy and self._is_sure(i, pool):
                        asked[place] = asked[place]._replace(depth=0)
            else:
                by_drafter[i] = drafter.draft(asked) if asked else [Pool() for _ in orders]
                self.computed_ms += 1e3 * (self._clock() - started_at)
                self.computed += [pool for pool, order in zip(by_drafter[i], asked, strict=False) if order.depth > 0]
        if tier == "free" or self.is_free:
            self.computed = [pool for i, found in by_drafter.items() if self._drafters[i].is_free for pool in found]
            self.computed_ms = free_ms
        pools = []
        for order, *own in zip(orders, *(by_drafter[i] for i in range(len(self._drafters))), strict=True):
            draft = self._merge(own) if len(own) > 1 else self._correct(own[0])
            self._open[order.key] = draft
            pools.append(draft.pool)
        return pools

    def _is_sure(self, drafter: int, pool: Pool) -> bool:
        return any(
            self._own[drafter].probability(prob, depth) >= SURE
            for prob, depth in zip(pool.probs, pool.depths, strict=True)
            if depth == 1
        )

    def choose(self, key: Key, nodes: Sequence[int]) -> None:
        """These nodes of the last pool of the sequence are sent to the target."""
        if (draft := self._open[key]) is not None:
            draft.chosen = nodes

    def _correct(self, pool: Pool) -> _Draft:
        """The pool of the only drafter; what `_merge` would make of it, sooner."""
        (own,), said = self._own, pool.probs
        given = [prob / (said[parent] if parent >= 0 else 1.0) for prob, parent in zip(said, pool.parents, strict=True)]
        conditionals = [own.probability(prob, depth) for prob, depth in zip(given, pool.depths, strict=True)]
        totals = dict.fromkeys(pool.parents, 0.0)
        for parent, prob in zip(pool.parents, conditionals, strict=True):
            totals[parent] += prob
        probs: list[float] = []
        for parent, prob in zip(pool.parents, conditionals, strict=True):
            total = totals[parent]
            above = probs[parent] if parent >= 0 else 1.0
            probs.append(above * prob if total <= MAX_PROB else above * prob * MAX_PROB / total)
        return _Draft(Pool(pool.tokens, pool.parents, pool.depths, probs), [_Evidence([prob]) for prob in given])

    def _merge(self, pools: Sequence[Pool]) -> _Draft:
        """Level by level, so that the trie is in BFS order like its sources."""
        merged, evidence = Pool(), list[_Evidence]()
        places = [{-1: -1} for _ in pools]
        ends = [0] * len(pools)
        for depth in range(1, max((pool.depths[-1] for pool in pools if pool.depths), default=0) + 1):
            level: dict[tuple[int, int], _Evidence] = {}
            spans = []
            for i, pool in enumerate(pools):
                start, ends[i] = ends[i], bisect_right(pool.depths, depth, ends[i])
                spans.append(range(start, ends[i]))
                for node in spans[i]:
                    parent = pool.parents[node]
                    found = level.setdefault((places[i][parent], pool.tokens[node]), _Evidence([None] * len(pools)))
                    found.said[i] = pool.probs[node] / (pool.probs[parent] if parent >= 0 else 1.0)
            index = self._add_level(merged, evidence, level, depth)
            for pool, place, span in zip(pools, places, spans, strict=True):
                for node in span:
                    place[node] = index[place[pool.parents[node]], pool.tokens[node]]
        return _Draft(merged, evidence)

    def _add_level(
        self, merged: Pool, evidence: list[_Evidence], level: dict[tuple[int, int], _Evidence], depth: int
    ) -> dict[tuple[int, int], int]:
        """Append the nodes of a level, siblings together; returns where they are."""
        index: dict[tuple[int, int], int] = {}
        for parent, group in groupby(sorted(level, key=lambda at: at[0]), lambda at: at[0]):
            siblings = list(group)
            found = [level[at] for at in siblings]
            probs = self._conditionals(found, depth)
            above = merged.probs[parent] if parent >= 0 else 1.0
            scale = above * min(1.0, MAX_PROB / sum(probs))
            for at, prob in zip(siblings, probs, strict=True):
                index[at] = merged.add(at[1], parent, depth, scale * prob)
            evidence += found
        return index

    def _conditionals(self, siblings: Sequence[_Evidence], depth: int) -> list[float]:
        """Calibrated probabilities of the children of one node, given that it is right."""
        looked = [any(each.said[i] is not None for each in siblings) for i in range(len(self._drafters))]
        probs = []
        for each in siblings:
            each.mix, missed = 0, 1.0
            for own, prob, has_looked in zip(self._own, each.said, looked, strict=True):
                if prob is not None:
                    missed *= 1.0 - own.probability(prob, depth)
                each.mix = 3 * each.mix + (NAMES if prob is not None else DISSENTS if has_looked else SILENT)
            each.pooled = 1.0 - missed
            probs.append(self._mixes[each.mix].probability(each.pooled, depth))
        return probs

    def _judge(self, draft: _Draft, truth: Sequence[int]) -> None:
        """Walk the draft along the committed tokens: each child of a node on the way was right or not."""
        pool, node, right = draft.pool, -1, list[int]()
        for token in truth:
            children = range(bisect_left(pool.parents, node), bisect_right(pool.parents, node))
            node = -2
            for child in children:
                is_right = pool.tokens[child] == token
                self._observe(draft.evidence[child], pool.depths[child], is_right)
                if is_right:
                    node = child
            if node == -2:
                break
            right.append(node)
        # nodes below the last committed token can only be right if it was drafted, and then they were not verified
        judged = [i for i in draft.chosen if pool.depths[i] <= len(truth) or node == -2]
        self.reliability.observe([pool.probs[i] for i in judged], [i in right for i in judged])

    def _observe(self, evidence: _Evidence, depth: int, is_right: bool) -> None:
        for own, prob in zip(self._own, evidence.said, strict=True):
            if prob is not None:
                own.observe(prob, depth, is_right)
        if len(self._drafters) > 1:
            self._mixes[evidence.mix].observe(evidence.pooled, depth, is_right)
