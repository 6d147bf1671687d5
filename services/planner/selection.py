"""Which candidate nodes are worth verifying: AdaServe's two phases under one budget, vectorised. Pure; knows no tokens.

Candidates are taken by falling path probability, and ancestors before descendants where two are equal. As probabilities fall
along every path, any such prefix of a request's candidates is closed under ancestors: a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.planner.costs import Costs, Floats

Ints = NDArray[np.int64]
QuotaOrder = Literal["cheapest", "slowest"]

TOLERANCE = 1e-9
"""Sums of probabilities within this of a quota fill it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """The pools of n requests in one row each, ancestors before descendants: the request's number, rising, and the path
    probability of every node.
    """

    owner: Ints
    prob: Floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What the n requests want: tokens owed (A, at least 1) and the most that one iteration can yield them (d + 1)."""

    debt: Floats
    most: Floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen candidates (rising indices), how many of each request's were chosen for its SLO, and whose debt stays open."""

    chosen: Ints
    num_required: Ints
    is_unmet: NDArray[np.bool_]

    @property
    def num_unmet(self) -> int:
        """How many debts stay open."""
        return int(np.count_nonzero(self.is_unmet))


def select(
    candidates: Candidates,
    demand: Demand,
    budget: int,
    *,
    max_required: int,
    order: QuotaOrder,
    has_rest: bool = True,
    num_others: int = 0,
    costs: Costs | None = None,
) -> Selection:
    """At most `budget` candidates: first what debts need, then the best of the rest over all requests.

    With `costs` the rest ends where expected tokens per ms are highest, those of `num_others` roots that take part of the time
    counted too; without, when the budget is spent; without `has_rest` there is none. A quota that the budget does not cover is
    granted in part.
    """
    budget = max(0, budget)
    num_requests = len(demand.debt)
    best_first = _by_prob(candidates.prob)
    ranked, counts, starts = _by_owner(candidates.owner, best_first, num_requests)
    quota, shortfall = _quotas(candidates.prob[ranked], counts, starts, demand, max_required)
    granted = _grant(quota, shortfall, demand.debt, budget, order)
    is_required = np.zeros(len(ranked), dtype=np.bool_)
    is_required[ranked] = _ranks(counts, starts) < np.repeat(granted, counts)
    required = np.flatnonzero(is_required)
    rest = best_first[~is_required[best_first]][: budget - len(required) if has_rest else 0]
    if costs is not None:
        # What debts need is spent: it must not make the rest look cheap, which is held against roots alone.
        more_ms = costs.by_count[len(required) :][: len(rest) + 1] - costs.by_count[len(required)]
        more_ms[1:] += np.cumsum(costs.per_node[candidates.owner[rest]])
        rest = rest[: _best_count(float(num_requests + num_others), candidates.prob[rest], costs.by_count[0] + more_ms)]
    return Selection(
        chosen=np.sort(np.concatenate((required, rest))),
        num_required=granted,
        is_unmet=(shortfall > 0) | (granted < quota),
    )


def select_equally(candidates: Candidates, num_requests: int, budget: int) -> Selection:
    """The same number of nodes for every request, its most probable ones (EAGLE-2's trees); a smaller pool as a whole."""
    share = max(0, budget) // max(1, num_requests)
    ranked, counts, starts = _by_owner(candidates.owner, _by_prob(candidates.prob), num_requests)
    chosen = np.sort(ranked[_ranks(counts, starts) < share])
    return _without_quotas(chosen, num_requests)


def select_chains(parents: Sequence[Sequence[int]], candidates: Candidates, length: int) -> Selection:
    """The most probable path of every request, up to `length` nodes long; `parents` index into each pool, -1 is the root."""
    probs = candidates.prob.tolist()
    chosen: list[int] = []
    start = 0
    for pool in parents:
        best: dict[int, int] = {}
        for node, parent in enumerate(pool):
            if parent not in best or probs[start + node] > probs[start + best[parent]]:
                best[parent] = node
        node = -1
        for _ in range(length):
            if (following := best.get(node)) is None:
                break
            node = following
            chosen.append(start + node)
        start += len(pool)
    return _without_quotas(np.array(chosen, dtype=np.int64), len(parents))


def _without_quotas(chosen: Ints, num_requests: int) -> Selection:
    none = np.zeros(num_requests, dtype=np.int64)
    return Selection(chosen=chosen, num_required=none, is_unmet=none.astype(np.bool_))


def _by_prob(prob: Floats) -> Ints:
    """Candidates by falling probability, equal ones in their order: one sort of integers, several times as fast as lexsort.

    The bits of positive floats order as the floats do; their last ones make room for the index.
    """
    index_bits = max(1, len(prob).bit_length())
    mask = np.int64((1 << index_bits) - 1)
    keys = (np.int64(1) << 62) - np.ascontiguousarray(prob).view(np.int64)
    return np.asarray(np.sort((keys & ~mask) | np.arange(len(prob))) & mask)


def _by_owner(owner: Ints, best_first: Ints, num_requests: int) -> tuple[Ints, Ints, Ints]:
    """The same order request by request, how many candidates each one has, and where they start."""
    counts = np.bincount(owner, minlength=num_requests)
    narrow = owner[best_first].astype(np.uint16 if num_requests < 1 << 16 else np.int64)  # stable sorts of 16 bits are linear
    return best_first[np.argsort(narrow, kind="stable")], counts, np.cumsum(counts) - counts


def _ranks(counts: Ints, starts: Ints) -> Ints:
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)


def _quotas(prob: Floats, counts: Ints, starts: Ints, demand: Demand, max_required: int) -> tuple[Ints, Floats]:
    """Per request the fewest of its best candidates that pay its debt, and what of the debt they leave open.

    `prob` is sorted within each request. The root counts as one token.
    """
    sums = np.concatenate(([0.0], np.cumsum(prob)))
    expected = 1.0 + sums[1:] - np.repeat(sums[starts], counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    is_short = expected < np.minimum(demand.debt, demand.most)[owner] - TOLERANCE
    num_short = np.bincount(owner[is_short], minlength=len(counts))
    in_debt = demand.debt > 1.0 + TOLERANCE
    quota = np.where(in_debt, np.minimum(num_short + 1, np.minimum(counts, max_required)), 0)
    left = demand.debt - (1.0 + sums[starts + quota] - sums[starts])
    return quota, np.where(left > TOLERANCE, left, 0.0)


def _grant(quota: Ints, shortfall: Floats, debt: Floats, budget: int, order: QuotaOrder) -> Ints:
    """Shares of the budget, in the order of the policy.

    "slowest" is the paper's: largest debt first, even where it cannot be paid. "cheapest" pays the debts that can be paid
    first, small quotas first, which keeps the most targets; then those that come nearest. The slower goes first among equals.
    """
    turn = np.argsort(-debt, kind="stable") if order == "slowest" else np.lexsort((-debt, quota, shortfall))
    asked = quota[turn]
    granted = np.empty_like(quota)
    granted[turn] = np.clip(budget - (np.cumsum(asked) - asked), 0, asked)
    return granted


def _best_count(sure: float, prob: Floats, ms: Floats) -> int:
    """How many of these candidates maximise expected tokens per ms; the fewest of equals."""
    tokens = sure + np.concatenate(([0.0], np.cumsum(prob)))
    return int(np.argmax(tokens / ms))
