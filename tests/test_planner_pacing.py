"""Whether to draft at all: rests where drafts do not pay, by load, by debts, and by the time that iterations really take."""

from __future__ import annotations

import math

import pytest

from services.planner.pacing import (
    FIRST_REST,
    FIRST_TRIAL,
    GLANCED_ROUNDS,
    LONGEST_REST,
    MAX_REGRET,
    NUM_GLANCED,
    NUM_PROBED,
    PLAIN_TRIAL,
    TRIAL_GAP,
    Pacing,
    Round,
    Tier,
    load_of,
)

PLAIN_MS, DRAFTED_MS = 30.0, 40.0


def round_of(num_requests: int, tokens: float, *, in_debt: int = 0, paid: int = 0) -> Round:
    return Round(
        num_requests=num_requests, tokens=tokens, ms=DRAFTED_MS, plain_ms=PLAIN_MS, num_in_debt=in_debt, num_paid=paid
    )  # fmt: skip


def rested(pacing: Pacing, num_running: int = 32, in_debt: int = 0, *, plain_ms: float | None = None) -> int:
    """Reports that are answered without drafts from here on; each iteration takes as long as is said."""
    count = 0
    while pacing.choose(num_running, in_debt, PLAIN_MS) is None:
        pacing.judge(0, num_running, plain_ms)
        count += 1
    return count


def play(pacing: Pacing, num_reports: int, tokens: dict[Tier, float], num_running: int = 8) -> list[Tier | None]:
    """Who is chosen for each report, when each kind of drafts brings as many tokens as is said, all accepted."""
    chosen = []
    for _ in range(num_reports):
        tier = pacing.choose(num_running, 0, PLAIN_MS)
        chosen.append(tier)
        if tier is not None:
            pacing.observe(round_of(num_running, tokens[tier]))
            pacing.judge(round(tokens[tier] - num_running), num_running, None)
    return chosen


def probe(
    pacing: Pacing, tokens: float, *, num_running: int = 32, drafted_ms: float | None = None, plain_ms: float | None = None
) -> int:
    """Rounds of drafts, all accepted as expected, until drafting rests; at most a hundred; trials of roots alone are none."""
    for count in range(100):
        while pacing.num_left <= PLAIN_TRIAL and pacing.choose(num_running, 0, PLAIN_MS) is None:
            pacing.judge(0, num_running, plain_ms)
        if pacing.num_left > PLAIN_TRIAL:
            return count
        pacing.observe(round_of(num_running, tokens))
        pacing.judge(round(tokens - num_running), num_running, drafted_ms)
    return 100


def test_rests_grow_while_drafts_do_not_pay_and_start_small_again_when_they_did() -> None:
    pacing = Pacing()
    lengths = []
    for _ in range(6):
        probe(pacing, 33.0)
        lengths.append(rested(pacing))
    assert lengths == [FIRST_REST, 32, 64, 128, LONGEST_REST, LONGEST_REST]
    for _ in range(math.ceil(NUM_PROBED / 32)):
        pacing.observe(round_of(32, 60.0))
    assert rested(pacing) == 0
    probe(pacing, 33.0)
    assert rested(pacing) == FIRST_REST


def known_plain(num_running: int) -> Pacing:
    """It has rested once at this load, and roots alone took what was predicted."""
    pacing = Pacing()
    probe(pacing, num_running, num_running=num_running)
    rested(pacing, num_running, plain_ms=PLAIN_MS)
    return pacing


def test_drafts_that_plainly_do_not_pay_are_only_glanced_at() -> None:
    """Four requests: eight rounds are NUM_PROBED drafts."""
    assert probe(Pacing(), 4.4, num_running=4) == GLANCED_ROUNDS, "0.83 times as many tokens per ms"
    assert probe(Pacing(), 5.0, num_running=4) == NUM_PROBED // 4, "0.94 times"
    assert probe(Pacing(), 1.1, num_running=1) == NUM_GLANCED, "one request"


def test_a_rest_is_so_long_that_probing_loses_little() -> None:
    """Three rounds of 40 ms bring what roots alone bring in 30 ms each; a rest of 50 takes fifty times what that lost."""
    pacing = known_plain(4)
    assert probe(pacing, 4.0, num_running=4) == GLANCED_ROUNDS
    lost_ms = GLANCED_ROUNDS * (DRAFTED_MS - PLAIN_MS)
    assert rested(pacing, 4) == pytest.approx(lost_ms / MAX_REGRET / PLAIN_MS, rel=0.1)
    unmeasured = Pacing()
    probe(unmeasured, 4.0, num_running=4)
    assert rested(unmeasured, 4) == FIRST_REST, "what roots alone take is only predicted: the rest measures it"


def test_who_is_in_debt_does_not_rest_to_make_up_for_probing() -> None:
    pacing = known_plain(4)
    while pacing.choose(4, 4, PLAIN_MS) is not None and pacing.num_left == 0:
        pacing.observe(round_of(4, 4.0, in_debt=4))
    assert pacing.num_left == 2 * FIRST_REST - 1, "the second rest, no longer one"


def test_each_load_has_its_own_record_which_outlives_other_loads() -> None:
    pacing = Pacing()
    for _ in range(3):
        probe(pacing, 33.0)
        rested(pacing)
    probe(pacing, 33.0)
    assert pacing.choose(32, 0, PLAIN_MS) is None
    assert pacing.choose(2, 0, PLAIN_MS) == "all", "nothing is known of two requests"
    assert probe(pacing, 4.0, num_running=2) == 100
    assert rested(pacing) == 8 * FIRST_REST - 1, "the rest of 32 requests goes on"


@pytest.mark.parametrize(("num_running", "goes_on"), [(32, True), (28, True), (39, False), (24, False), (8, False)])
def test_a_load_is_the_same_within_a_fifth(num_running: int, goes_on: bool) -> None:
    assert (load_of(num_running) == load_of(32)) == goes_on


def test_a_new_debt_ends_a_rest() -> None:
    pacing = Pacing()
    probe(pacing, 33.0)
    assert pacing.choose(32, 0, PLAIN_MS) is None
    assert pacing.choose(32, 1, PLAIN_MS) == "all"


def test_drafting_goes_on_while_it_pays_debts_and_not_for_debts_that_it_cannot_pay() -> None:
    paying, hopeless, dear = Pacing(), Pacing(), Pacing()
    for pacing, tokens, paid in ((paying, 40.0, 3), (hopeless, 40.0, 0), (dear, 33.0, 3)):
        assert pacing.choose(32, 32, PLAIN_MS) == "all"
        for _ in range(20):
            if pacing.num_left == 0:
                pacing.observe(round_of(32, tokens, in_debt=32, paid=paid))
    assert rested(paying, in_debt=32) == 0
    assert rested(hopeless, in_debt=32) == FIRST_REST
    assert rested(dear, in_debt=32) == FIRST_REST, "three gain, and all others lose a quarter"


def test_drafts_that_take_longer_than_predicted_do_not_pay() -> None:
    """50 tokens in 40 ms beat 32 in 30; not if they take 55."""
    assert probe(Pacing(), 50.0, drafted_ms=DRAFTED_MS) == 100
    assert probe(Pacing(), 50.0, drafted_ms=None) == 100, "nothing was measured"
    assert probe(Pacing(), 50.0, drafted_ms=1.4 * DRAFTED_MS) < 20


def test_where_roots_alone_take_longer_than_predicted_drafts_pay_earlier() -> None:
    slow, even = Pacing(), Pacing()
    for pacing, plain_ms in ((slow, 1.5 * PLAIN_MS), (even, PLAIN_MS)):
        assert probe(pacing, 36.0) == 1
        rested(pacing, plain_ms=plain_ms)
    assert probe(slow, 36.0) == 100
    assert probe(even, 36.0) == 1


@pytest.mark.parametrize(("plain_ms", "goes_on"), [(PLAIN_MS, True), (None, True), (0.7 * PLAIN_MS, False)])
def test_roots_alone_are_tried_now_and_then_and_drafting_rests_where_they_are_faster(
    plain_ms: float | None, goes_on: bool
) -> None:
    """53 tokens in 40 ms are 1.24 times as many as 32 in 30; if these take 21, fewer."""
    assert (probe(Pacing(), 53.0, plain_ms=plain_ms) == 100) == goes_on


def test_trials_of_roots_alone_are_announced_and_short_and_only_made_where_drafts_bring_little() -> None:
    def gaps(tokens: float, plain_ms: float | None) -> list[int]:
        pacing, found, gap = Pacing(), list[int](), 0
        for _ in range(FIRST_TRIAL + 3 * (TRIAL_GAP + PLAIN_TRIAL) - 2):
            if pacing.choose(32, 0, PLAIN_MS) == "all":
                pacing.observe(round_of(32, tokens))
                pacing.judge(round(tokens) - 32, 32, None)
                gap += 1
                continue
            if gap:
                assert pacing.num_left == PLAIN_TRIAL - 1
                found, gap = [*found, gap], 0
            pacing.judge(0, 32, plain_ms)
        return found

    assert gaps(52.0, PLAIN_MS) == [FIRST_TRIAL - 1, TRIAL_GAP, TRIAL_GAP]
    assert gaps(70.0, PLAIN_MS) == [FIRST_TRIAL - 1], "drafts bring much"
    assert gaps(70.0, None) == [FIRST_TRIAL - 1, 4 * FIRST_TRIAL], "nothing was measured: ever more rarely"


def test_roots_alone_are_not_tried_while_a_request_needs_what_drafts_bring() -> None:
    pacing = Pacing()
    for _ in range(3 * FIRST_TRIAL):
        assert pacing.choose(32, 4, PLAIN_MS) == "all"
        pacing.observe(round_of(32, 52.0, in_debt=4, paid=4))
    assert pacing.choose(32, 0, PLAIN_MS) is None
    assert pacing.num_left == PLAIN_TRIAL - 1
    assert pacing.choose(32, 1, PLAIN_MS) == "all", "a debt ends a trial"
    pacing = Pacing()
    while pacing.choose(32, 0, PLAIN_MS) is not None:
        pacing.observe(round_of(32, 52.0))
    pacing.pass_by(PLAIN_TRIAL)
    assert pacing.choose(32, 0, PLAIN_MS) == "all", "what nobody drafts for is part of it"


def test_a_late_draft_s_iteration_tells_nothing_of_the_time_that_drafts_take() -> None:
    """It held no nodes and was short for that."""
    on_time, late = Pacing(), Pacing()
    for _ in range(FIRST_TRIAL - 2):
        for pacing in (on_time, late):
            assert pacing.choose(32, 0, PLAIN_MS) == "all"
            pacing.observe(round_of(32, 53.0))
        on_time.judge(21, 32, DRAFTED_MS)
        late.judge(21, 32, 0.5 * DRAFTED_MS, is_late=True)
    assert late._all.load.current_gain == pytest.approx(on_time._all.load.current_gain, rel=0.05)


def test_an_iteration_that_something_else_held_up_does_not_end_drafting() -> None:
    pacing = Pacing()
    for round_index in range(30):
        assert pacing.choose(32, 0, PLAIN_MS) == "all"
        pacing.observe(round_of(32, 60.0))
        pacing.judge(28, 32, 100.0 * DRAFTED_MS if round_index == 10 else DRAFTED_MS)


def test_drafts_that_come_late_are_judged_as_wrong() -> None:
    """Nothing that was expected is accepted: trust falls until drafting rests."""
    pacing, num_drafted = Pacing(), 0
    while num_drafted < 100 and pacing.choose(32, 0, PLAIN_MS):
        pacing.observe(round_of(32, 60.0))
        pacing.judge(0, 32, None)
        num_drafted += 1
    assert num_drafted < 10


# 8 tokens in 30 ms are plain decoding; drafts, which make it 40 ms, must bring 3 more


def test_drafters_that_cost_nothing_go_on_while_the_others_rest() -> None:
    chosen = play(Pacing(has_free=True), 200, {"all": 10.0, "free": 13.0})
    assert chosen[:4] == ["all"] * 4
    assert chosen.count("free") > 150
    assert None not in chosen


def test_all_must_bring_more_than_those_that_cost_nothing() -> None:
    assert play(Pacing(has_free=True), 200, {"all": 12.0, "free": 13.5}).count("free") > 150
    better = play(Pacing(has_free=True), 200, {"all": 13.5, "free": 12.0})
    assert 0 < better.count("free") < 20, "they are tried, as all bring little"
    assert "free" not in play(Pacing(has_free=True), 200, {"all": 20.0, "free": 12.0})


def test_drafts_that_keep_no_core_busy_may_bring_less() -> None:
    """1.055 times as many tokens per ms."""
    few = 11.25
    assert play(Pacing(), 200, {"all": few}).count(None) > 100
    assert play(Pacing(is_free=True), 200, {"all": few}).count(None) < 30
    assert play(Pacing(has_free=True), 200, {"all": 10.0, "free": few}).count("free") > 150
    for pacing in (Pacing(is_free=True), Pacing(has_free=True)):
        assert pacing.choose(8, 0, PLAIN_MS, most_gain=1.05) == "all"
    assert Pacing().choose(8, 0, PLAIN_MS, most_gain=1.05) is None


def test_where_nothing_pays_all_rest_together_and_say_so() -> None:
    pacing = Pacing(has_free=True)
    chosen = play(pacing, 400, {"all": 9.0, "free": 9.0})
    assert chosen.count(None) > 250
    while pacing.choose(8, 0, PLAIN_MS) is not None:
        pacing.observe(round_of(8, 9.0))
    left = pacing.num_left
    assert rested(pacing, num_running=8) >= left


def test_what_cannot_pay_even_if_guessed_well_is_not_probed() -> None:
    pacing = Pacing(has_free=True)
    assert pacing.choose(32, 0, PLAIN_MS, most_gain=1.0) is None
    assert pacing.num_left == FIRST_REST, "the executor waits for no answer"
    assert pacing.choose(32, 1, PLAIN_MS, most_gain=1.0) == "all", "a debt may be paid at others' cost"
    assert pacing.num_left == 0
    assert pacing.choose(32, 1, PLAIN_MS, most_gain=0.7) is None, "not at any cost"
    assert pacing.choose(2, 0, PLAIN_MS, most_gain=2.0) == "all"


def test_what_seems_hopeless_is_probed_rarely_and_in_time_for_who_waits() -> None:
    pacing = Pacing()
    num_iterations = 0
    while pacing.choose(32, 0, PLAIN_MS, most_gain=0.5, num_iterations=8) is None:
        num_iterations += 8
        assert pacing.num_left == min(FIRST_REST, LONGEST_REST - num_iterations)
    assert num_iterations == LONGEST_REST
    assert pacing.choose(32, 0, PLAIN_MS, most_gain=0.5) is None


def test_iterations_that_one_report_tells_of_all_count_of_a_rest() -> None:
    pacing = Pacing()
    probe(pacing, 33.0)
    assert pacing.num_left == FIRST_REST
    assert pacing.choose(32, 0, PLAIN_MS, num_iterations=8) is None
    pacing.pass_by(7)
    assert pacing.num_left == FIRST_REST - 15
    assert pacing.choose(32, 0, PLAIN_MS) is None
    assert pacing.choose(32, 0, PLAIN_MS) == "all"
