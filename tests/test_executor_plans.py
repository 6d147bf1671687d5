"""Plans of random situations: what holds of every one of them."""

from __future__ import annotations

import itertools

import pytest

from common.latency import max_rows, predict_ms
from tests.plans import Case, decoding, plan, random_case, waiting

CASES = [random_case(seed) for seed in range(400)]


def test_every_root_is_in_the_plan_and_nothing_is_planned_that_nobody_has() -> None:
    for case in CASES:
        result = case.plan
        views = {view.request_id: view for view in case.sequences}
        jobs = {job.job_id: job for job in case.jobs}
        assert set(result.decode) == {view.request_id for view in case.decoding}
        assert all(0 <= num <= len(views[name].tree_probs) for name, num in result.decode.items())
        assert all(not views[name].is_decoding for name in result.prefill)
        assert all(0 < num <= views[name].num_uncomputed for name, num in result.prefill.items())
        assert all(0 < num <= jobs[name].forward_tokens and not jobs[name].is_backward for name, num in result.forward.items())
        assert all(num > 0 and jobs[name].is_backward for name, num in result.backward.items())


def test_a_pass_never_has_more_than_max_batch_tokens() -> None:
    for case in CASES:
        assert case.plan.num_tokens <= max(case.limits.max_batch_tokens, len(case.decoding))
    greedy = [decoding(str(i), tree_probs=(0.9,) * 60, num_required=60) for i in range(100)]
    assert plan(*greedy, max_batch_tokens=256).num_tokens == 256


def test_required_nodes_come_before_prefill_and_prefill_before_extra_nodes() -> None:
    for case in CASES:
        result, room = case.plan, case.limits.max_batch_tokens - len(case.decoding)
        if sum(_required(case).values()) <= room:
            assert all(result.decode[name] >= num for name, num in _required(case).items())
    tree = decoding(tree_probs=(0.9,) * 20, num_required=5)
    full = plan(tree, waiting("w", 100), max_batch_tokens=16)
    assert (full.decode, full.prefill) == ({"d": 5}, {"w": 10})


def test_prompts_wait_for_tight_targets_but_not_for_ever() -> None:
    tight = [decoding(str(i), tpot_ms=12.5, num_decoded=10, decode_ms=115.0) for i in range(4)]
    patient = plan(*tight, waiting("w", 500), num_starved=7)
    assert patient.limit_ms == pytest.approx(10.4)
    assert (patient.prefill, patient.num_starved) == ({}, 8)
    due = plan(*tight, waiting("w", 500), num_starved=8)
    assert (due.prefill, due.num_starved) == ({"w": 16}, 0)
    seen_starved = seen_due = 0
    for case in CASES:
        demand = sum(view.num_uncomputed for view in case.waiting)
        room = max(0, case.limits.max_batch_tokens - len(case.decoding) - sum(_required(case).values()))
        num_prefill, floor = sum(case.plan.prefill.values()), min(demand, case.limits.min_prefill_tokens)
        if case.num_starved >= case.limits.max_prefill_gap or not case.decoding:
            assert num_prefill >= min(floor, room)
            seen_due += floor > 0
        is_starved = num_prefill < min(floor, room)
        assert not is_starved or case.plan.num_starved == case.num_starved + 1
        seen_starved += is_starved
    assert seen_starved > 10
    assert seen_due > 50


def test_prompts_are_computed_in_their_order() -> None:
    """One behind a long context is not overtaken by one whose rows are cheaper."""
    for case in CASES:
        ranked = sorted(case.waiting, key=lambda v: (v.priority, v.first_token_due_at or float("inf"), v.arrived_at))
        given = [case.plan.prefill.get(view.request_id, 0) for view in ranked]
        assert given == sorted(given, key=lambda num: num == 0)
        partial = [num < view.num_uncomputed for num, view in zip(given, ranked, strict=True) if num]
        assert not any(partial[:-1])


def test_prefill_beyond_its_floor_and_training_beyond_its_share_fit_into_the_limit() -> None:
    """Draft nodes are the planner's: it chose them for speed, so they are not bounded by the limit again."""
    seen_prefill = seen_training = seen_behind = 0
    for case in CASES:
        result, profile = case.plan, case.profile
        assert result.rows == case.rows(result.decode, result.prefill, result.forward)
        is_due = case.num_starved >= case.limits.max_prefill_gap or not case.decoding
        if result.prefill and not (is_due and sum(result.prefill.values()) <= case.limits.min_prefill_tokens):
            assert predict_ms(profile, case.rows(_required(case), result.prefill)) <= result.prefill_limit_ms + 1e-9
            seen_prefill += 1
            seen_behind += any(view.context_tokens for view in case.waiting if view.request_id in result.prefill)
        inference_ms = predict_ms(profile, case.rows(result.decode, result.prefill))
        assert result.forward_ms == pytest.approx(predict_ms(profile, result.rows))
        assert result.predicted_ms >= result.forward_ms >= inference_ms
        training_ms = result.predicted_ms - inference_ms
        is_one_row = sum(result.forward.values()) == 1  # which a job that is owed its share gets whatever it costs
        if case.sequences and training_ms > case.limits.min_finetune_share * result.limit_ms + 1e-9 and not is_one_row:
            assert result.predicted_ms <= result.limit_ms + 1e-9
            seen_training += 1
    assert seen_prefill > 50
    assert seen_behind > 20
    assert seen_training > 50


def test_max_rows_inverts_the_profile() -> None:
    for case in CASES[:50]:
        beside = case.rows({}, {})
        for budget_ms, context in itertools.product((0.0, 5.0, 30.0, 90.0), (0, 10, 6000)):
            rows = max_rows(case.profile, budget_ms, 2000, beside, context)
            assert rows == 0 or predict_ms(case.profile, beside.with_segment(rows, context)) <= budget_ms
            assert rows == 2000 or predict_ms(case.profile, beside.with_segment(rows + 1, context)) > budget_ms


def _required(case: Case) -> dict[str, int]:
    return {view.request_id: min(view.num_required, len(view.tree_probs)) for view in case.decoding}
