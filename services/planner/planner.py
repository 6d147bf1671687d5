"""From a report to draft trees: sequences, drafter and selection joined. Knows no bus and no clock; `now` is an argument."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from common.messages import DraftTree, IterationReport
from services.planner import control, trees
from services.planner.drafter import Drafter, DraftOrder, Pool
from services.planner.selection import Demand, QuotaOrder, Selection, iteration_costs, select
from services.planner.sequences import Sequence, SequenceTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """How trees are chosen: who is served first when the budget is short, whether it ends where more nodes do not pay."""

    order: QuotaOrder
    has_stop_rule: bool
    has_quotas: bool = True
    """Whether debts are paid first."""
    has_rest: bool = True
    """Whether nodes that no debt needs are taken."""
    is_calibrated: bool
    """Whether the drafter learns from what was accepted."""


MODES: dict[str, Mode | None] = {
    "heddle": Mode(order="cheapest", has_stop_rule=True, is_calibrated=True),
    "adaserve": Mode(order="slowest", has_stop_rule=False, is_calibrated=False),
    "throughput": Mode(order="cheapest", has_stop_rule=True, is_calibrated=True, has_quotas=False),
    "slo": Mode(order="cheapest", has_stop_rule=False, is_calibrated=True, has_rest=False),
    "none": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Limits of formulas 8 and 9; see PlannerConfig."""

    min_depth: int
    max_depth: int
    max_width: int
    draft_tokens: int
    depth_offset: float
    width_offset: int


class Planner:
    """Answers the reports of any number of executors. Without a mode it answers with no trees."""

    def __init__(self, drafter: Drafter, mode: Mode | None, shape: Shape) -> None:
        self._drafter = drafter
        self._mode = mode
        self._shape = shape
        self.table = SequenceTable(drafter)
        self.counters: Counter[str] = Counter()

    def answer(self, report: IterationReport, now: float) -> tuple[DraftTree, ...]:
        """Take the report in and draft for the next iteration."""
        self.counters["reports"] += 1
        if self._mode is None:
            return ()
        sequences = self.table.apply(report, now)
        if not sequences or report.token_budget <= 0:
            return ()
        depth, width = self._limits(report.token_budget, len(sequences))
        depths = [min(depth, sequence.max_depth) for sequence in sequences.values()]
        orders = [DraftOrder((report.executor_id, name), own) for name, own in zip(sequences, depths, strict=True)]
        pools = self._drafter.draft(orders, width)
        selection = self._select(report, self._mode, list(sequences.values()), depths, pools)
        self._count(selection)
        return _trees(sequences, pools, selection)

    def unknown(self, report: IterationReport) -> tuple[str, ...]:
        """Sequences of a report just answered that have to be opened (again) to be drafted for."""
        return () if self._mode is None else self.table.unknown(report)

    def _limits(self, num_nodes: int, num_requests: int) -> tuple[int, int]:
        shape = self._shape
        depth = control.draft_depth(
            num_nodes, num_requests, offset=shape.depth_offset, least=shape.min_depth, most=shape.max_depth
        )
        width = control.draft_width(shape.draft_tokens, num_requests, offset=shape.width_offset, most=shape.max_width)
        return depth, width

    def _select(
        self, report: IterationReport, mode: Mode, sequences: list[Sequence], depths: list[int], pools: list[Pool]
    ) -> Selection:
        budget = min(report.token_budget, sum(len(pool) for pool in pools))
        debts = [control.token_debt(each.decode_ms, report.t_spec_ms, each.tpot_ms, each.num_decoded) for each in sequences]
        return select(
            trees.join(pools),
            Demand(debt=np.array(debts), most=np.array(depths) + 1.0),
            budget,
            max_required=control.quota_limit(report.token_budget, len(sequences)) if mode.has_quotas else 0,
            order=mode.order,
            has_rest=mode.has_rest,
            cost_ms=iteration_costs(report.latency.points, report.base_tokens, budget) if mode.has_stop_rule else None,
        )

    def _count(self, selection: Selection) -> None:
        num_required = int(selection.num_required.sum())
        self.counters["drafted_nodes"] += len(selection.chosen)
        self.counters["slo_nodes"] += num_required
        self.counters["throughput_nodes"] += len(selection.chosen) - num_required
        self.counters["unmet_quotas"] += selection.num_unmet


def _trees(sequences: dict[str, Sequence], pools: list[Pool], selection: Selection) -> tuple[DraftTree, ...]:
    picked = trees.split(selection.chosen.tolist(), pools)
    required: list[int] = selection.num_required.tolist()
    return tuple(
        trees.cut(pool, nodes, request_id=name, root=sequence.root, length=sequence.length, num_required=num_required)
        for (name, sequence), pool, nodes, num_required in zip(sequences.items(), pools, picked, required, strict=True)
        if nodes
    )
