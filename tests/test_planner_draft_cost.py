"""What drafting costs, learned from drafts as they come, and limits that keep drafts in time."""

from __future__ import annotations

import random

import pytest

from services.planner.draft_cost import MAX_SURPRISE, DraftCost, rows_of


def learned(level_ms: float, row_ms: float, *, noise: float = 0.0) -> DraftCost:
    cost, source = DraftCost(), random.Random(1)
    for _ in range(200):
        levels = source.randint(1, 8)
        rows = levels * source.randint(1, 24)
        cost.observe(levels, rows, (level_ms * levels + row_ms * rows) * (1 + noise * source.uniform(-1, 1)))
    return cost


@pytest.mark.parametrize(("level_ms", "row_ms"), [(2.0, 0.05), (0.3, 0.8), (0.0, 0.5), (3.0, 0.0)])
def test_levels_and_rows_are_told_apart(level_ms: float, row_ms: float) -> None:
    cost = learned(level_ms, row_ms, noise=0.1)
    for levels, rows in ((1, 8), (6, 6), (4, 96)):
        assert cost.of(levels, rows) == pytest.approx(level_ms * levels + row_ms * rows, rel=0.15, abs=0.1)
    assert min(cost.level_ms, cost.row_ms) >= 0.0


def test_drafts_of_one_kind_still_give_a_cost() -> None:
    cost = DraftCost()
    for _ in range(300):
        cost.observe(4, 4, 10.0)
    assert cost.of(4, 4) == pytest.approx(10.0, rel=0.01)
    assert 10.0 < cost.of(4, 40) < 110.0


def test_a_draft_that_was_held_up_hardly_counts() -> None:
    cost = learned(1.0, 0.2)
    before = cost.of(4, 32)
    cost.observe(4, 32, 10_000.0)
    assert before < cost.of(4, 32) < before * (1 + MAX_SURPRISE / 2)


def test_limits_leave_room_for_how_far_drafts_are_from_what_is_predicted() -> None:
    steady, shaky, limits = learned(1.0, 0.2), learned(1.0, 0.2, noise=0.5), [(6, 3)] * 8
    assert shaky.deviation_ms > 10 * steady.deviation_ms > 0.0
    patience_ms = 1.05 * steady.of(6, rows_of(limits))
    assert steady.affordable(limits, patience_ms) == limits
    assert shaky.affordable(limits, patience_ms) != limits


def test_limits_are_cut_first_in_width_then_in_depth_and_only_when_late() -> None:
    cost = learned(1.0, 0.2)
    limits = [(6, 3)] * 8
    assert cost.affordable(limits, 1e9) == limits
    needs_ms = cost.of(6, rows_of(limits))
    narrower = cost.affordable(limits, 0.7 * needs_ms)
    assert {depth for depth, _ in narrower} == {6}
    assert max(width for _, width in narrower) < 3
    shallow = cost.affordable(limits, 0.2 * needs_ms)
    assert {width for _, width in shallow} == {1}
    assert 1 <= shallow[0][0] < 6
    for patience_ms in (5.0, 10.0, 20.0, 40.0):
        fitting = cost.affordable(limits, patience_ms)
        assert cost.of(fitting[0][0], rows_of(fitting)) <= patience_ms or fitting == [(1, 1)] * 8
    assert cost.affordable(limits, 0.0) == [(1, 1)] * 8
    assert cost.affordable([], 0.0) == []
