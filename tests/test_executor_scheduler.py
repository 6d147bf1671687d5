"""The plan of an iteration, on plain values: order of claims, latency limit, floors and fairness."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from common.latency import Rows, predict_ms
from common.messages import LatencyProfile
from services.executor.finetune_share import JobView
from services.executor.scheduler import iteration_limits_ms, plan_iteration, slack_ms
from services.executor.views import Limits
from tests.plans import BACKWARD, JOB, LINEAR, decoding, plan, random_case, random_sequence, waiting


def test_prefill_is_ordered_by_the_deadline_of_the_first_token() -> None:
    views = [
        waiting("late", 40, first_token_due_at=9.0, arrived_at=0.0),
        waiting("none, old", 40, arrived_at=1.0),
        waiting("none, young", 40, arrived_at=5.0),
        waiting("soon", 40, first_token_due_at=2.0, arrived_at=8.0),
    ]
    order = ["soon", "late", "none, old", "none, young"]
    for order_given in itertools.permutations(views):
        assert list(plan(*order_given).prefill) == order
        assert plan(*order_given, max_batch_tokens=100).prefill == {"soon": 40, "late": 40, "none, old": 20}


def test_extra_nodes_are_the_most_probable_ones() -> None:
    one = decoding("a", tree_probs=(0.9, 0.8, 0.3, 0.1), num_required=1)
    two = decoding("b", tree_probs=(0.95, 0.7, 0.2))
    assert plan(one, two).decode == {"a": 4, "b": 3}
    assert plan(one, two, max_batch_tokens=6).decode == {"a": 2, "b": 2}
    assert plan(one, two, JOB, finetune_weight=0.25).decode == {"a": 3, "b": 2}, "a training token is worth more than the rest"
    assert plan(one, two, JOB, finetune_weight=0.99).decode == {"a": 1, "b": 0}


def test_draft_nodes_come_before_prompts_which_keep_half_of_the_time() -> None:
    """What nodes are expected to bring makes the iteration longer; prompts must not take that time without the nodes."""
    tight = decoding("tight", tpot_ms=20.0, num_decoded=10, decode_ms=190.0, tree_probs=(0.9, 0.8, 0.7))
    result = plan(tight, waiting("w", 900))
    assert result.decode == {"tight": 3}
    assert result.limit_ms == pytest.approx(0.9 * 20.0 * (10 + 3.4) - 190.0)
    assert result.prefill["w"] == pytest.approx((result.limit_ms - 10.1) / 0.1, abs=6)
    wide = dataclasses.replace(tight, tree_probs=(0.5,) * 900)
    nodes = plan(wide, waiting("w", 900), max_iteration_ms=60.0).decode["tight"]
    assert plan(wide, max_iteration_ms=60.0).decode["tight"] == pytest.approx(2 * nodes, abs=2)
    cut = plan(dataclasses.replace(wide, tree_probs=(0.9, *[0.01] * 899)), waiting("w", 900), max_batch_tokens=20)
    assert cut.decode["tight"] == 20 - 1 - 16, "a chunk of a prompt has room in the batch"


def test_nodes_that_keep_a_request_in_time_are_not_left_out_for_prompts() -> None:
    steep = LatencyProfile(points=((1, 20.0), (101, 220.0)))
    tight = decoding("tight", tpot_ms=40.0, num_decoded=50, decode_ms=1920.0, max_remaining=50, tree_probs=(0.6,) * 8)
    nodes = [plan(dataclasses.replace(tight, decode_ms=ms), waiting("w", 900), profile=steep).decode["tight"] for ms in
             (1700.0, 1920.0, 1940.0)]  # fmt: skip
    assert nodes[1:] == [8, 8], "in time with them, and behind"


def test_time_that_only_left_out_nodes_would_pay_for_is_not_taken() -> None:
    tight = decoding("tight", tpot_ms=20.0, num_decoded=10, decode_ms=190.0, tree_probs=(0.9, 0.8, 0.7))
    result = plan(tight, waiting("w", 900), JOB, finetune_weight=0.85)
    assert result.decode == {"tight": 1}
    assert result.limit_ms == pytest.approx(max(10.1, 0.9 * 20.0 * (10 + 1.9) - 190.0))


def test_slack_is_what_the_target_leaves() -> None:
    limits = Limits(safety=1.0)
    on_time = decoding(tpot_ms=30.0, num_decoded=10, decode_ms=310.0)
    assert slack_ms(on_time, 10.0, limits) == pytest.approx(30 * 11 - 310)
    early = dataclasses.replace(on_time, decode_ms=100.0)
    assert slack_ms(early, 10.0, limits) == pytest.approx(30.0), "slack saved up is not spent in one stall"
    drafted = dataclasses.replace(on_time, tree_probs=(0.9, 0.5))
    assert slack_ms(drafted, 10.0, limits) == pytest.approx(30 * (10 + 2.4) - 310)
    assert slack_ms(dataclasses.replace(on_time, tpot_ms=None), 10.0, limits) is None
    hopeless = dataclasses.replace(on_time, decode_ms=30.0 * 30 - 10.0 * 20 + 1.0)
    assert slack_ms(hopeless, 10.0, limits) is None
    assert slack_ms(dataclasses.replace(hopeless, decode_ms=hopeless.decode_ms - 2.0), 10.0, limits) is not None


def test_the_limit_is_the_least_slack_within_bounds() -> None:
    limits = Limits(safety=1.0, max_iteration_ms=100.0, max_prefill_ms=300.0, idle_iteration_ms=40.0)
    fast, slow = decoding(tpot_ms=30.0, decode_ms=300.0), decoding(tpot_ms=500.0, decode_ms=300.0)
    free = decoding()
    assert iteration_limits_ms(0.0, [fast, slow, free], [], 10.0, limits) == (30.0, 30.0, False)
    assert iteration_limits_ms(0.0, [slow, free], [], 10.0, limits) == (100.0, 100.0, False)
    assert iteration_limits_ms(0.0, [free], [], 10.0, limits) == (100.0, 300.0, False)
    assert iteration_limits_ms(0.0, [free], [], 150.0, limits) == (150.0, 300.0, False)
    assert iteration_limits_ms(0.0, [], [waiting("w", 5)], 10.0, limits) == (100.0, 300.0, False)
    assert iteration_limits_ms(0.0, [], [], 10.0, limits) == (40.0, 300.0, False)
    behind = decoding(tpot_ms=30.0, decode_ms=325.0)
    assert iteration_limits_ms(0.0, [behind, slow], [], 10.0, limits) == (10.0, 10.0, True)


def test_a_request_that_can_still_catch_up_stops_training() -> None:
    behind = decoding(tpot_ms=20.0, num_decoded=10, decode_ms=215.0, max_remaining=50)
    result = plan(behind, JOB, BACKWARD)
    assert result.limit_ms == pytest.approx(10.1)
    assert (result.forward, result.backward) == ({}, {})


def test_a_target_below_one_token_per_iteration_is_not_hopeless_while_drafts_bring_more() -> None:
    alone = decoding("r", tpot_ms=8.0, num_decoded=10, decode_ms=80.0, max_remaining=20)
    assert slack_ms(alone, 10.0, Limits()) is None
    assert slack_ms(dataclasses.replace(alone, tokens_per_step=1.5), 10.0, Limits()) is not None


def test_a_hopeless_request_throttles_nobody() -> None:
    hopeless = decoding("h", tpot_ms=20.0, num_decoded=10, decode_ms=2000.0, max_remaining=5)
    without = plan(dataclasses.replace(hopeless, tpot_ms=None, decode_ms=0.0), JOB)
    assert plan(hopeless, JOB) == dataclasses.replace(without, prefill_limit_ms=Limits().max_iteration_ms)
    assert sum(plan(hopeless, JOB).forward.values()) > 500


@pytest.mark.parametrize("job", [JOB, BACKWARD])
def test_training_keeps_its_share_while_everybody_is_on_time(job: JobView) -> None:
    crowd = [decoding(str(i), tpot_ms=60.0, num_decoded=10, decode_ms=0.0) for i in range(5)]
    prompts = [waiting(str(i), 300) for i in range(10, 20)]
    result = plan(*crowd, *prompts, job)
    assert result.limit_ms == pytest.approx(54.0)
    training_ms = result.predicted_ms - predict_ms(LINEAR, Rows(result.num_tokens - sum(result.forward.values()), 250))
    assert training_ms >= 0.1 * 54.0 - 0.2
    assert sum(result.prefill.values()) > 300, "and does not take all of the prefill's"


def test_what_is_free_goes_to_prompts_while_somebody_is_behind() -> None:
    flat = LatencyProfile(points=((1, 10.0), (100, 10.0), (200, 40.0)))
    behind = decoding(tpot_ms=20.0, num_decoded=10, decode_ms=215.0, max_remaining=50)
    assert plan(behind, waiting("w", 500), JOB, profile=flat).prefill == {"w": 99}


def test_drafts_and_prefill_leave_training_its_rows() -> None:
    crowd = [decoding(str(i), tree_probs=(0.9,) * 30) for i in range(5)]
    for views in (crowd, [*crowd, waiting("w", 20)], [*crowd, waiting("w", 500)]):
        result = plan(*views, JOB, max_batch_tokens=100)
        assert result.num_tokens == 100
        assert sum(result.forward.values()) == 10
    behind = decoding("behind", tpot_ms=20.0, num_decoded=10, decode_ms=215.0, max_remaining=50)
    assert plan(*crowd, behind, JOB, max_batch_tokens=100).forward == {}


@pytest.mark.parametrize("job", [JOB, BACKWARD])
@pytest.mark.parametrize("idle_ms", [25.0, 35.0, 70.0])
def test_training_alone_fills_an_idle_iteration(job: JobView, idle_ms: float) -> None:
    result = plan(job, idle_iteration_ms=idle_ms)
    assert idle_ms - 0.5 <= result.predicted_ms <= idle_ms


@pytest.mark.parametrize("is_backward", [False, True])
def test_idle_jobs_all_advance(is_backward: bool) -> None:
    """The first row's 40 ms are paid once, not by the first job alone: its share of 120 ms is less."""
    profile = LatencyProfile(points=((1, 40.0), (1001, 240.0)), backward_ms_per_token=0.4)
    jobs = [JobView(job_id=str(i), forward_tokens=5000, is_backward=is_backward) for i in range(4)]
    result = plan(*jobs, profile=profile, idle_iteration_ms=120.0)
    work = result.backward if is_backward else result.forward
    assert set(work) == {"0", "1", "2", "3"}
    assert max(work.values()) <= 2 * min(work.values())
    assert result.predicted_ms <= 120.0


def test_training_advances_on_a_device_where_one_token_takes_longer_than_an_idle_iteration_may() -> None:
    slow = LatencyProfile(points=((1, 500.0), (11, 600.0)), backward_ms_per_token=20.0)
    assert plan(JOB, profile=slow, idle_iteration_ms=120.0).num_tokens == 51, (
        "half of the time opens the pass, half is for rows"
    )
    assert plan(BACKWARD, profile=slow, idle_iteration_ms=120.0).backward["back"] > 0


def test_a_window_alone_does_not_shrink_below_what_is_worth_a_pass() -> None:
    disturbed = LatencyProfile(points=((1, 60.0), (8, 300.0), (1024, 301.0)), backward_ms_per_token=1.0)
    assert plan(JOB, profile=disturbed).num_tokens == 32
    assert plan(JOB, decoding(tpot_ms=150.0), profile=disturbed).num_tokens < 8


UNITS_MS = 2000.0
IN_FLIGHT = JobView(job_id="flight", forward_tokens=0, is_backward=True, in_flight=Rows(300, 100, 20_000))


def test_finetuning_goes_in_units_only_alone_and_a_unit_is_short() -> None:
    """Beside requests the plan is the one without units: no more time, no less finetuning."""
    num_alone = 0
    for seed in range(200):
        case, rng = random_case(seed), random.Random(seed)
        jobs = [dataclasses.replace(IN_FLIGHT, job_id=job.job_id) if rng.random() < 0.3 else job for job in case.jobs]
        limits = dataclasses.replace(case.limits, interruptible_ms=UNITS_MS)
        result = plan_iteration(0.0, case.sequences, jobs, case.profile, limits, case.num_starved)
        if case.sequences or not jobs:
            assert result == plan_iteration(0.0, case.sequences, jobs, case.profile, case.limits, case.num_starved)
            assert result.unit is None
            continue
        num_alone += 1
        assert result.unit is not None
        assert result.limit_ms == max(UNITS_MS, 2 * predict_ms(case.profile, Rows(1)))
        assert sum(result.forward.values()) + sum(result.backward.values()) > 0
        passes = [job.in_flight for job in jobs if job.in_flight] + ([result.rows] if result.num_tokens else [])
        unit_ms = [result.unit.forward * predict_ms(case.profile, rows) / rows.tokens for rows in passes]
        unit_ms.append(result.unit.backward * case.profile.backward_ms_per_token)
        assert max(unit_ms) == pytest.approx(limits.idle_iteration_ms / 2)
    assert num_alone > 20


@pytest.mark.parametrize("other", [dataclasses.replace(JOB, is_evaluation=True), dataclasses.replace(JOB, is_drafter=True)])
def test_what_cannot_stop_keeps_iterations_short(other: JobView) -> None:
    assert plan(JOB, interruptible_ms=UNITS_MS).limit_ms == UNITS_MS
    other = dataclasses.replace(other, job_id="other")
    assert plan(JOB, other, interruptible_ms=UNITS_MS) == plan(JOB, other)


def test_what_is_in_flight_costs_what_its_pass_was_predicted_to_cost() -> None:
    assert IN_FLIGHT.in_flight is not None
    per_token = predict_ms(LINEAR, IN_FLIGHT.in_flight) / IN_FLIGHT.in_flight.tokens
    beside = plan(decoding(tpot_ms=60.0), IN_FLIGHT)
    without = plan(decoding(tpot_ms=60.0))
    assert beside.backward["flight"] * per_token == pytest.approx(beside.limit_ms - without.predicted_ms)


def test_nothing_to_do_is_an_empty_plan() -> None:
    result = plan()
    assert (result.num_tokens, result.backward, result.predicted_ms) == (0, {}, 0.0)


@pytest.mark.parametrize("job", [JOB, BACKWARD])
def test_a_looser_target_never_means_less_training(job: JobView) -> None:
    """While every target can be met: a hopeless one binds nobody, so loosening it until it can be met costs training."""
    rng, num_rises = random.Random(5), 0
    for _ in range(200):
        others = [view for i in range(5) if (view := random_sequence(str(i), rng)).tpot_ms is None and view.is_decoding]
        targets = sorted(rng.uniform(20, 200) for _ in range(5))
        decode_ms = rng.uniform(5, 20) * 10
        done = []
        for tpot_ms in targets:
            view = decoding(tpot_ms=tpot_ms, num_decoded=10, decode_ms=decode_ms, max_remaining=50)
            result = plan(view, *others, job)
            done.append(sum(result.forward.values()) + sum(result.backward.values()))
        assert done == sorted(done)
        num_rises += done[0] < done[-1]
    assert num_rises > 100
