"""Which candidate nodes are worth verifying: AdaServe's two phases under one budget, vectorised. Pure; knows no tokens.

Candidates are taken by falling path probability, and ancestors before descendants where two are equal. As probabilities fall
along every path, any such prefix of a request's candidates is closed under ancestors: a tree.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.latency import interpolate

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
QuotaOrder = Literal["cheapest", "slowest"]

TOLERANCE = 1e-9
"""Sums of probabilities within this of a quota fill it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """The pools of n requests in one row each: the request's number (rising), depth, and path probability of every node."""

    owner: Ints
    depth: Ints
    prob: Floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What the n requests want: tokens owed (A, at least 1) and the most that one iteration can yield them (d + 1)."""

    debt: Floats
    most: Floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen candidates (rising indices), how many of each request's were chosen for its SLO, and how many debts stay open."""

    chosen: Ints
    num_required: Ints
    num_unmet: int


def select(
    candidates: Candidates,
    demand: Demand,
    budget: int,
    *,
    max_required: int,
    order: QuotaOrder,
    has_rest: bool = True,
    cost_ms: Floats | None = None,
) -> Selection:
    """At most `budget` candidates: first what debts need, then the best of the rest over all requests.

    With `cost_ms` (of an iteration with 0..budget candidates) the rest ends where expected tokens per ms are highest; without,
    when the budget is spent; without `has_rest` there is none. A quota that the budget does not cover is granted in part.
    """
    budget = max(0, budget)
    num_requests = len(demand.debt)
    ranked = np.lexsort((candidates.depth, -candidates.prob, candidates.owner))
    counts = np.bincount(candidates.owner, minlength=num_requests)
    starts = np.cumsum(counts) - counts
    quota, shortfall = _quotas(candidates.prob[ranked], counts, starts, demand, max_required)
    granted = _grant(quota, shortfall, demand.debt, budget, order)
    is_required = np.arange(len(ranked)) - np.repeat(starts, counts) < np.repeat(granted, counts)
    required, rest = ranked[is_required], ranked[~is_required]
    rest = rest[np.lexsort((candidates.depth[rest], -candidates.prob[rest]))][: budget - len(required) if has_rest else 0]
    if cost_ms is not None:
        sure = num_requests + candidates.prob[required].sum()
        rest = rest[: _best_count(sure, candidates.prob[rest], cost_ms[len(required) :])]
    return Selection(
        chosen=np.sort(np.concatenate((required, rest))),
        num_required=granted,
        num_unmet=int(np.count_nonzero((shortfall > 0) | (granted < quota))),
    )


def iteration_costs(points: tuple[tuple[int, float], ...], base_tokens: int, budget: int) -> Floats:
    """Predicted ms of iterations with 0..budget tokens more than `base_tokens`, up to a factor common to all."""
    base_tokens = max(0, base_tokens)
    size = 1 << (base_tokens + budget + 1).bit_length()
    return _cost_table(points, size)[base_tokens : base_tokens + budget + 1]


@lru_cache(maxsize=16)
def _cost_table(points: tuple[tuple[int, float], ...], size: int) -> Floats:
    return np.array([interpolate(points, tokens) for tokens in range(size)])


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


def _best_count(sure: float, prob: Floats, cost_ms: Floats) -> int:
    """How many of these candidates maximise expected tokens per ms; the fewest of equals."""
    tokens = sure + np.concatenate(([0.0], np.cumsum(prob)))
    return int(np.argmax(tokens / cost_ms[: len(tokens)]))
