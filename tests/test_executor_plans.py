"""Plans of random situations: what holds of every one of them."""

from __future__ import annotations

import pytest

from common.latency import max_tokens, predict_ms
from tests.plans import decoding, plan, random_case, waiting

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
        required = {view.request_id: min(view.num_required, len(view.tree_probs)) for view in case.decoding}
        if sum(required.values()) <= room:
            assert all(result.decode[name] >= num for name, num in required.items())
        extra = sum(result.decode.values()) - sum(required.values())
        demand = sum(view.num_uncomputed for view in case.sequences if not view.is_decoding)
        if extra > 0:
            assert sum(result.prefill.values()) >= min(demand, case.limits.min_prefill_tokens)
    tree = decoding(tree_probs=(0.9,) * 20, num_required=5)
    full = plan(tree, waiting("w", 100), max_batch_tokens=16)
    assert (full.decode, full.prefill) == ({"d": 5}, {"w": 10})


def test_prefill_goes_on_when_decoding_leaves_no_time() -> None:
    tight = [decoding(str(i), tpot_ms=12.5, num_decoded=10, decode_ms=115.0) for i in range(4)]
    result = plan(*tight, waiting("w", 500), min_prefill_tokens=32)
    assert result.limit_ms == pytest.approx(10.4)
    assert result.prefill == {"w": 32}
    for case in CASES:
        demand = sum(view.num_uncomputed for view in case.sequences if not view.is_decoding)
        required = sum(min(view.num_required, len(view.tree_probs)) for view in case.decoding)
        room = max(0, case.limits.max_batch_tokens - len(case.decoding) - required)
        assert sum(case.plan.prefill.values()) >= min(demand, case.limits.min_prefill_tokens, room)


def test_prefill_beyond_its_floor_and_training_beyond_its_share_fit_into_the_limit() -> None:
    """Draft nodes are the planner's: it chose them for speed, so they are not bounded by the limit again."""
    seen_prefill = seen_training = 0
    for case in CASES:
        result, profile = case.plan, case.profile
        required = sum(min(view.num_required, len(view.tree_probs)) for view in case.decoding)
        num_prefill = sum(result.prefill.values())
        if num_prefill > case.limits.min_prefill_tokens:
            tokens = len(case.decoding) + required + num_prefill
            assert predict_ms(profile, tokens, case.context) <= result.limit_ms + 1e-9
            seen_prefill += 1
        inference_ms = predict_ms(profile, result.num_tokens - sum(result.forward.values()), case.context)
        assert result.forward_ms == pytest.approx(predict_ms(profile, result.num_tokens, case.context))
        assert result.predicted_ms >= result.forward_ms >= inference_ms
        training_ms = result.predicted_ms - inference_ms
        if training_ms > case.limits.min_finetune_share * result.limit_ms + 1e-9:
            assert result.predicted_ms <= result.limit_ms + 1e-9
            seen_training += 1
    assert seen_prefill > 20
    assert seen_training > 50


def test_max_tokens_inverts_the_profile() -> None:
    for case in CASES[:50]:
        for budget_ms in (0.0, 5.0, 30.0, 90.0):
            tokens = max_tokens(case.profile, budget_ms, 2000, 10)
            assert tokens == 0 or predict_ms(case.profile, tokens, 10) <= budget_ms
            assert tokens == 2000 or predict_ms(case.profile, tokens + 1, 10) > budget_ms
