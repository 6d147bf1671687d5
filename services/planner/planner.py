"""From a report to draft trees: sequences, drafter and selection joined. Knows no bus; `now` is an argument."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from common.latency import Rows, predict_ms
from common.messages import DraftTree, IterationReport
from services.planner import control, trees
from services.planner.costs import Costs, Floats, iteration_costs
from services.planner.draft_cost import DEVIATIONS, DraftCost
from services.planner.drafter import DraftOrder, FeatureNeed, Pool
from services.planner.mixed import MixedDrafter
from services.planner.modes import Mode
from services.planner.pacing import Pacing, Round, Tier
from services.planner.selection import TOLERANCE, Candidates, Demand, Selection, select, select_chains, select_equally
from services.planner.sequences import Sequence, SequenceTable

PATIENCE = 0.8
"""Part of the time that an executor waits for drafts which drafting may take; the rest is for messages and selecting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Limits of formulas 8 and 9; see PlannerConfig."""

    min_depth: int
    max_depth: int
    max_width: int
    draft_tokens: int
    depth_offset: float
    width_offset: int
    min_prob: float


class Planner:
    """Answers the reports of any number of executors. Without a mode it answers with no trees."""

    def __init__(
        self, drafter: MixedDrafter, mode: Mode | None, shape: Shape, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`clock` (seconds) only measures how long drafting and selecting take."""
        self._drafter = drafter
        self._mode = mode
        self._shape = shape
        self._clock = clock
        self._costs: dict[Tier, DraftCost] = {"all": DraftCost(), "free": DraftCost()}
        self.table = SequenceTable(drafter, lambda: Pacing(has_free=drafter.has_tiers, is_free=drafter.is_free))
        self.counters: Counter[str] = Counter()

    def answer(self, report: IterationReport, now: float, *, is_stale: bool = False) -> tuple[DraftTree, ...]:
        """Take the report in and draft for the next iteration, unless that has begun: then the report is stale."""
        self.counters["reports"] += 1
        if self._mode is None:
            return ()
        sequences = self.table.apply(report, now)
        pacing = self.table.pacing(report.executor_id)
        pacing.judge(
            sum(each.accepted_len for each in report.progress),
            len(sequences),
            report.measured_ms,
            is_late=not any(each.num_drafted for each in report.progress),
        )
        if is_stale or not sequences or report.token_budget <= 0:
            self.counters["stale_reports"] += is_stale
            pacing.pass_by(report.num_iterations)
            return ()
        debts = _debts(sequences, report.t_spec_ms - report.wait_ms - report.busy_ms)
        num_running = self.table.num_running(report.executor_id)
        num_in_debt, plain_ms = int(np.count_nonzero(debts > 1.0)), _plain_ms(report)
        tier: Tier | None = "all"
        if self._mode.has_stop_rule:
            most_gain = control.most_gain(plain_ms, _level_rows_ms(report, len(sequences)), self._shape.max_depth)
            tier = pacing.choose(num_running, num_in_debt, plain_ms, most_gain, report.num_iterations)
        if tier is None:
            self.counters["rests"] += 1
            return ()
        cost = self._costs[tier]
        limits = self._limits(report, self._mode, sequences, debts, cost)
        if self._mode.chain_length is None:
            deviations = DEVIATIONS if self._mode.has_stop_rule else 0.0  # who spends all of a budget spends all of the time
            limits = cost.affordable(limits, PATIENCE * report.patience_ms, deviations)
        costly = None
        if self._mode.has_stop_rule and self._drafter.has_free:
            # where more nodes cost no drafting, only the selection ends a tree: matches go on once they were right
            costly, limits = limits, self._most_limits(report, sequences)
            if tier == "free" or self._drafter.is_free:
                limits = cost.affordable(limits, PATIENCE * report.patience_ms)
        keys = [(report.executor_id, name) for name in sequences]
        orders = [DraftOrder(key, *own) for key, own in zip(keys, limits, strict=True)]
        asked = None if costly is None else [DraftOrder(key, *own) for key, own in zip(keys, costly, strict=True)]
        depths = [depth for depth, _ in limits]
        started_at = self._clock()
        pools = self._drafter.draft(orders, tier, asked, needy=np.flatnonzero(debts > 1.0).tolist())
        drafted_at = self._clock()
        selection, last = self._select(_drafts(report, sequences, depths, pools), self._mode, debts)
        picked = trees.split(selection.chosen.tolist(), pools)
        for order, nodes in zip(orders, picked, strict=True):
            self._drafter.choose(order.key, nodes)
        drafted = _trees(sequences, pools, picked, selection.num_required.tolist())
        draft_ms = 1e3 * (drafted_at - started_at)
        if self._drafter.computed:
            cost.observe(*trees.size(self._drafter.computed), self._drafter.computed_ms)
        self._count(selection, draft_ms, 1e3 * (self._clock() - drafted_at))
        pacing.observe(last)
        return drafted

    def num_resting(self, executor_id: str) -> int:
        """How many more iterations of this executor, which has just been answered, get no drafts unless things change."""
        return self.table.pacing(executor_id).num_left if self._mode is not None and self._mode.has_stop_rule else 0

    @property
    def need(self) -> FeatureNeed | None:
        """What executors are asked for."""
        return None if self._mode is None else self._drafter.need

    @property
    def reliability_error(self) -> float:
        """Expected calibration error of the path probabilities of nodes that were sent and judged."""
        return self._drafter.reliability.error

    def unknown(self, report: IterationReport) -> tuple[str, ...]:
        """Sequences of a report just answered that have to be opened (again) to be drafted for."""
        return () if self._mode is None else self.table.unknown(report)

    def _limits(
        self, report: IterationReport, mode: Mode, sequences: dict[str, Sequence], debts: Floats, cost: DraftCost
    ) -> list[tuple[int, int]]:
        """Depth and width per request, by load; where the planner learns, also by how well each request is guessed.

        A request in debt is drafted for at any price.
        """
        shape, num_requests = self._shape, len(sequences)
        if mode.chain_length is not None:
            return [(min(mode.chain_length, sequence.max_depth), 1) for sequence in sequences.values()]
        most = self._most_limits(report, sequences)
        if not mode.is_calibrated:
            return most
        plain_ms, level_rows_ms = _plain_ms(report), _level_rows_ms(report, num_requests)
        level_ms = cost.of(1, num_requests)
        worth = max(shape.min_prob, control.least_worth(num_requests, plain_ms, level_rows_ms / num_requests, level_ms))
        limits = []
        for each, debt, (depth, width) in zip(sequences.values(), debts.tolist(), most, strict=True):
            least, rate = shape.min_prob if debt > 1.0 else worth, each.accepts.rate
            limits.append((control.useful_depth(rate, least, depth), control.useful_width(rate, least, width)))
        return limits

    def _most_limits(self, report: IterationReport, sequences: dict[str, Sequence]) -> list[tuple[int, int]]:
        """Depth and width per request, by load alone."""
        shape, num_requests = self._shape, len(sequences)
        depth = control.draft_depth(
            report.token_budget, num_requests, offset=shape.depth_offset, least=shape.min_depth, most=shape.max_depth
        )
        width = control.draft_width(shape.draft_tokens, num_requests, offset=shape.width_offset, most=shape.max_width)
        return [(min(depth, sequence.max_depth), width) for sequence in sequences.values()]

    def _select(self, drafts: _Drafts, mode: Mode, plain_debts: Floats) -> tuple[Selection, Round]:
        """The selection, and what it is expected to bring."""
        report = drafts.report
        best = _choose(drafts, mode, report.t_spec_ms)
        has_targets = any(each.tpot_ms is not None for each in drafts.sequences.values())
        if mode.has_quotas and best.ms > report.t_spec_ms and has_targets:
            # t_spec depends on the trees that it decides about: one step towards the fixed point, unless nodes cost more
            # time than they pay for and more of them only make it worse
            second = _choose(drafts, mode, best.ms)
            if second.selection.num_unmet < best.selection.num_unmet:
                best = second
        if mode.has_quotas and mode.has_stop_rule and best.selection.num_required.any():
            # what pays some debts makes the iteration longer for all: not if no less is owed after it than without
            cheaper = _choose(drafts, dataclasses.replace(mode, has_quotas=False), report.t_spec_ms)
            if (cheaper.owed, cheaper.ms) < (best.owed, best.ms):
                best = cheaper
        selection = best.selection
        in_debt, is_unmet = plain_debts > 1.0, selection.is_unmet
        num_requests = len(in_debt) + report.num_others
        last = Round(
            num_requests=num_requests,
            tokens=num_requests + float(drafts.candidates.prob[selection.chosen].sum()),
            ms=best.ms - report.other_ms,
            plain_ms=_plain_ms(report),
            num_in_debt=int(in_debt.sum()),
            num_paid=int((in_debt & ~is_unmet).sum() - (~in_debt & is_unmet).sum()),
        )
        return selection, last

    def _count(self, selection: Selection, draft_ms: float, select_ms: float) -> None:
        num_required = int(selection.num_required.sum())
        self.counters["drafted_nodes"] += len(selection.chosen)
        self.counters["slo_nodes"] += num_required
        self.counters["throughput_nodes"] += len(selection.chosen) - num_required
        self.counters["unmet_quotas"] += selection.num_unmet
        self.counters["draft_ms"] += draft_ms  # type: ignore[assignment]
        self.counters["select_ms"] += select_ms  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class _Drafts:
    """What there is to choose from, in the order of `sequences`."""

    report: IterationReport
    sequences: dict[str, Sequence]
    depths: list[int]
    pools: list[Pool]
    candidates: Candidates
    costs: Costs


def _drafts(report: IterationReport, sequences: dict[str, Sequence], depths: list[int], pools: list[Pool]) -> _Drafts:
    candidates = trees.join(pools)
    contexts = [each.length for each in sequences.values()]
    budget = min(report.token_budget, len(candidates.prob))
    costs = iteration_costs(report.latency, report.t_spec_ms - report.other_ms, report.base_tokens, contexts, budget)
    return _Drafts(report, sequences, depths, pools, candidates, costs)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A selection, the ms of the iteration that holds it, and the tokens that are owed after it, expected of all requests."""

    selection: Selection
    ms: float
    owed: float


def _choose(drafts: _Drafts, mode: Mode, t_spec_ms: float) -> _Choice:
    """The selection for debts as of an iteration of `t_spec_ms`; debts stay open as of the one that holds it."""
    selection = _choose_nodes(drafts, mode, t_spec_ms)
    prob, owners = drafts.candidates.prob[selection.chosen], drafts.candidates.owner[selection.chosen]
    ms = drafts.report.other_ms + drafts.costs.of(owners)
    left = _debts(drafts.sequences, ms) - 1.0 - np.bincount(owners, prob, minlength=len(drafts.sequences))
    selection = dataclasses.replace(selection, is_unmet=left > TOLERANCE)
    return _Choice(selection, ms, float(np.maximum(left, 0.0).sum()))


def _choose_nodes(drafts: _Drafts, mode: Mode, t_spec_ms: float) -> Selection:
    num_requests, budget = len(drafts.sequences), drafts.report.token_budget
    if mode.chain_length is not None:
        length = min(mode.chain_length, budget // num_requests)
        return select_chains([pool.parents for pool in drafts.pools], drafts.candidates, length)
    if mode.is_equal:
        return select_equally(drafts.candidates, num_requests, budget)
    return select(
        drafts.candidates,
        Demand(debt=_debts(drafts.sequences, t_spec_ms), most=np.array(drafts.depths) + 1.0),
        len(drafts.costs.by_count) - 1,
        max_required=control.quota_limit(budget, num_requests) if mode.has_quotas else 0,
        order=mode.order,
        has_rest=mode.has_rest,
        num_others=drafts.report.num_others,
        costs=drafts.costs if mode.has_stop_rule else None,
    )


def _plain_ms(report: IterationReport) -> float:
    """What decoding roots alone takes. Prompts and training are no part of it: they have to be computed either way, in this
    iteration or in another, so that a token which drafts bring must be worth its own time.
    """
    return report.t_spec_ms - report.wait_ms - report.busy_ms - report.other_ms


def _level_rows_ms(report: IterationReport, num_requests: int) -> float:
    """What a node for each request adds to the iteration."""
    base = max(1, report.base_tokens)
    return predict_ms(report.latency, Rows(base + num_requests)) - predict_ms(report.latency, Rows(base))


def _debts(sequences: dict[str, Sequence], t_spec_ms: float) -> Floats:
    return np.array(
        [control.token_debt(each.decode_ms, t_spec_ms, each.tpot_ms, each.num_decoded) for each in sequences.values()]
    )


def _trees(
    sequences: dict[str, Sequence], pools: list[Pool], picked: list[list[int]], required: list[int]
) -> tuple[DraftTree, ...]:
    return tuple(
        trees.cut(pool, nodes, request_id=name, root=sequence.root, length=sequence.length, num_required=num_required)
        for (name, sequence), pool, nodes, num_required in zip(sequences.items(), pools, picked, required, strict=True)
        if nodes
    )
