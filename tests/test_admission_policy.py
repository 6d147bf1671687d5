"""Where requests go, on plain values: predictions, promises, refusals, and the bookkeeping between heartbeats."""

from __future__ import annotations

import math
from collections import Counter

import msgspec
import pytest

from common.latency import Rows, predict_ms
from common.messages import Beat, ExecutorLoad, InferenceRequest, LatencyProfile, Rejected, ServiceState, Slo
from services.admission.inflight import NUM_DELAYS, InFlight
from services.admission.policy import Limits, Placement, admit, chunk_tokens, forecast, prefill_ms, prompts_ahead

LIMITS = Limits(prefill_chunk=100, max_backlog_ms=1000.0, max_waiting=8)
PROFILE = LatencyProfile(points=((1, 40.0), (11, 50.0), (111, 150.0)))
"""39 ms and 1 ms per token."""


def load(**changes: object) -> ExecutorLoad:
    idle = ExecutorLoad(
        model="base",
        adapters=("tuned",),
        max_model_len=1000,
        page_size=16,
        num_pages=200,
        free_pages=200,
        num_running=0,
        num_waiting=0,
        waiting_prefill_tokens=0,
        context_tokens=0,
        promised_tpot_ms=(),
        latency=PROFILE,
    )
    return msgspec.structs.replace(idle, **changes)


def beat(executor_id: str = "e", state: ServiceState = "ready", **changes: object) -> Beat:
    return Beat(role="executor", instance_id=executor_id, state=state, sent_at=0.0, period_s=1.0, executor=load(**changes))


def request(
    num_tokens: int = 100, model: str = "base", tpot_ms: float | None = None, ttft_ms: float | None = None, **changes: object
) -> InferenceRequest:
    plain = InferenceRequest(
        request_id="r",
        model=model,
        prompt_tokens=(1,) * num_tokens,
        max_tokens=10,
        slo=Slo(tpot_ms=tpot_ms, ttft_ms=ttft_ms),
        arrived_at=50.0,
    )
    return msgspec.structs.replace(plain, **changes)


def decide(
    asked: InferenceRequest, *executors: Beat, now: float = 50.0, excluded: tuple[str, ...] = ()
) -> Placement | Rejected:
    return admit(asked, executors, now, LIMITS, excluded)


def place(asked: InferenceRequest, *executors: Beat, now: float = 50.0) -> Placement:
    decision = decide(asked, *executors, now=now)
    assert isinstance(decision, Placement), decision
    return decision


def refuse(asked: InferenceRequest, *executors: Beat, excluded: tuple[str, ...] = ()) -> Rejected:
    decision = decide(asked, *executors, excluded=excluded)
    assert isinstance(decision, Rejected), decision
    return decision


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_an_idle_executor_takes_what_it_serves(model: str) -> None:
    assert place(request(model=model, tpot_ms=50.0), beat()) == Placement(executor_id="e", best_effort=False)


@pytest.mark.parametrize(
    "asked",
    [
        request(0),
        request(max_tokens=0),
        request(max_tokens=-5),
        request(max_tokens=5, num_generated=5),
        request(tpot_ms=0.0),
        request(ttft_ms=-1.0),
        request(tpot_ms=math.nan),
        request(ttft_ms=math.inf),
    ],
)
def test_invalid_requests_are_refused_for_good(asked: InferenceRequest) -> None:
    refusal = refuse(asked, beat())
    assert (refusal.reason, refusal.retry_after_ms) == ("invalid", 0)


def test_an_adapter_goes_where_it_is_resident_unless_targets_are_missed_there() -> None:
    asked = msgspec.structs.replace(request(model="tuned", tpot_ms=50.0), base_model="base")
    without, busy = beat("a", adapters=()), beat("e", num_running=3)
    assert place(asked, without, busy).executor_id == "e"
    assert place(asked, without).executor_id == "a"
    assert place(asked, without, beat("e", num_running=60)).executor_id == "a"
    assert refuse(asked, beat("f", adapters=(), model="another")).reason == "unknown_model"


def test_an_unknown_model_is_named() -> None:
    refusal = refuse(request(model="gpt-9"), beat())
    assert (refusal.reason, refusal.retry_after_ms) == ("unknown_model", 0)
    assert "gpt-9" in refusal.message


@pytest.mark.parametrize(
    "executors",
    [(), (beat(state="starting"),), (beat(state="draining"),), (beat(state="starting"), beat("f", adapters=(), model="x"))],
)
def test_nobody_ready_is_worth_a_retry(executors: tuple[Beat, ...]) -> None:
    refusal = refuse(request(), *executors)
    assert refusal.reason == "no_executor"
    assert refusal.retry_after_ms > 0


def test_an_executor_without_load_serves_nothing() -> None:
    assert (
        refuse(request(), Beat(role="executor", instance_id="e", state="ready", sent_at=0, period_s=1)).reason
        == "unknown_model"
    )


@pytest.mark.parametrize(("num_tokens", "fits"), [(999, True), (1000, False), (5000, False)])
def test_a_prompt_must_leave_room_for_a_token_in_the_window(num_tokens: int, fits: bool) -> None:
    if fits:
        assert place(request(num_tokens), beat()).executor_id == "e"
    else:
        refusal = refuse(request(num_tokens), beat())
        assert (refusal.reason, refusal.retry_after_ms) == ("too_long", 0)
        assert "999" in refusal.message


def test_a_prompt_must_fit_into_all_pages() -> None:
    small = beat(num_pages=10, free_pages=10)
    assert place(request(159), small).executor_id == "e"
    assert refuse(request(160), small).reason == "too_long"
    assert place(request(160), small, beat("large")).executor_id == "large"


def test_ttft_is_predicted_from_the_queue_in_chunks() -> None:
    busy = load(num_running=10, waiting_prefill_tokens=150)
    assert prefill_ms(busy, [250], 100) == pytest.approx(2 * 149 + 99)
    ahead = forecast(request(100), "e", busy, 50.1, LIMITS)
    assert ahead.backlog_ms == pytest.approx(149 + 99)
    assert ahead.ttft_ms == pytest.approx(100 + 2 * 149 + 99), "it has waited 100 ms already"


def test_each_chunk_of_a_prompt_is_predicted_behind_those_before_it() -> None:
    profile = msgspec.structs.replace(PROFILE, ms_per_context_token=0.002, ms_per_row_context=0.0003, correction=1.5)
    busy = load(num_running=3, context_tokens=600, num_waiting=2, waiting_prefill_tokens=401, latency=profile)
    assert prompts_ahead(busy) == [201, 200]
    roots = Rows(3, 600, 600)
    for length in (1, 99, 100, 101, 850):
        chunks = [(min(100, length - start), start) for start in range(0, length, 100)]
        expected = sum(predict_ms(profile, roots.with_segment(*chunk)) for chunk in chunks)
        assert prefill_ms(busy, [length], 100) == pytest.approx(expected)
    long, many = prefill_ms(busy, [6000], 100), prefill_ms(busy, [100] * 60, 100)
    assert long > 1.5 * many, "many short prompts do not attend to each other"


def test_a_prompt_is_predicted_to_wait_for_the_promises_that_can_be_kept() -> None:
    """PROFILE takes 50 ms with 11 rows and 1 ms for each one more."""
    assert chunk_tokens(load(num_running=11), 100, 0) == 100
    for promised, expected in ((1000.0, 100), (100.0, 40), (60.0, 4), (51.0, 2), (49.0, 100)):
        assert chunk_tokens(load(num_running=11, promised_tpot_ms=(500.0, promised)), 100, 0) == expected, promised
    behind = msgspec.structs.replace(PROFILE, ms_per_row_context=0.001)
    assert chunk_tokens(load(num_running=11, promised_tpot_ms=(100.0,), latency=behind), 100, 1000) == 20
    tight, free = (forecast(request(400), "e", load(num_running=11, promised_tpot_ms=p), 50.0, LIMITS) for p in ((60.0,), ()))
    assert tight.ttft_ms == pytest.approx(100 * 54.0)
    assert free.ttft_ms == pytest.approx(4 * 150.0)


def test_tpot_is_predicted_with_everyone_who_is_ahead() -> None:
    assert forecast(request(), "e", load(num_running=6, num_waiting=4), 50.0, LIMITS).tpot_ms == pytest.approx(50.0)
    profile = msgspec.structs.replace(PROFILE, ms_per_context_token=0.01)
    crowded = load(latency=profile, context_tokens=1000, waiting_prefill_tokens=300)
    assert forecast(request(100), "e", crowded, 50.0, LIMITS).tpot_ms == pytest.approx(40 + 14)


def test_the_executor_that_answers_first_is_preferred() -> None:
    executors = beat("a", waiting_prefill_tokens=100), beat("b"), beat("c", num_running=5)
    assert place(request(tpot_ms=60.0, ttft_ms=500.0), *executors).executor_id == "b"


def test_a_tight_request_goes_where_its_target_can_be_met() -> None:
    fast = LatencyProfile(points=((1, 10.0), (100, 20.0)))
    executors = beat("slow"), beat("fast", latency=fast, waiting_prefill_tokens=900)
    assert place(request(tpot_ms=20.0), *executors) == Placement(executor_id="fast", best_effort=False)
    assert place(request(ttft_ms=160.0), *executors) == Placement(executor_id="slow", best_effort=False)


def test_a_promise_is_not_broken_for_a_newcomer() -> None:
    tight = beat("a", num_running=10, promised_tpot_ms=(49.5,) * 10)
    loose = beat("b", num_running=20, promised_tpot_ms=(100.0,) * 20)
    assert place(request(), tight, loose) == Placement(executor_id="b", best_effort=False)
    assert place(request(), tight) == Placement(executor_id="a", best_effort=True), "rather late than never"


def test_a_promise_that_is_broken_anyway_does_not_count() -> None:
    assert place(request(), beat(num_running=10, promised_tpot_ms=(30.0,) * 10)).best_effort is False


def test_what_no_executor_can_meet_is_best_effort_on_the_least_bad() -> None:
    executors = beat("a", num_running=9), beat("b", num_running=2)
    assert place(request(tpot_ms=20.0), *executors) == Placement(executor_id="b", best_effort=True, attainable=False)


def test_without_free_pages_a_request_waits_as_best_effort() -> None:
    executors = beat("full", free_pages=6), beat("free", num_running=50)
    assert place(request(100), *executors) == Placement(executor_id="free", best_effort=False)
    assert place(request(100), executors[0]) == Placement(executor_id="full", best_effort=True)
    assert place(request(95), executors[0]) == Placement(executor_id="full", best_effort=False)
    assert place(request(100, tpot_ms=50.0), executors[0]).attainable, "it waits before its first token"
    assert not place(request(100, ttft_ms=5000.0), executors[0]).attainable


def test_a_long_queue_ends_best_effort_and_tells_when_to_come_back() -> None:
    busy = beat("a", waiting_prefill_tokens=1000, num_waiting=3)
    busier = beat("b", waiting_prefill_tokens=3000, num_waiting=3)
    refusal = refuse(request(tpot_ms=1.0), busy, busier)
    assert refusal.reason == "overloaded"
    assert refusal.retry_after_ms == 1390, "the shorter backlog: 10 chunks of 139 ms"
    assert place(request(), busy).best_effort is False, "without a target the queue may be long"


def test_many_waiting_requests_end_best_effort_too() -> None:
    refusal = refuse(request(tpot_ms=1.0), beat(num_waiting=8))
    assert refusal.reason == "overloaded"
    assert refusal.retry_after_ms >= 100
    assert place(request(tpot_ms=1.0), beat(num_waiting=7)).best_effort


def test_best_effort_prefers_a_short_queue_over_a_better_forecast() -> None:
    quick = LatencyProfile(points=((1, 1.0), (1000, 1.5)))
    executors = beat("quick", latency=quick, num_waiting=8), beat("short", num_waiting=7)
    assert place(request(tpot_ms=0.5), *executors) == Placement(executor_id="short", best_effort=True, attainable=False)


def test_executors_that_refused_are_not_asked_again() -> None:
    executors = beat("a"), beat("b")
    assert decide(request(), *executors, excluded=("a",)) == Placement(executor_id="b", best_effort=False)
    assert refuse(request(), *executors, excluded=("a", "b")).reason == "no_executor"


def test_a_burst_between_heartbeats_spreads_over_executors() -> None:
    in_flight = InFlight()
    beats = [beat(name) for name in "abc"]
    placed: Counter[str] = Counter()
    for i in range(12):
        asked = request(50 + 10 * (i % 3), request_id=str(i), tpot_ms=200.0)
        decision = place(asked, *(in_flight.add_to(each) for each in beats))
        in_flight.send(decision.executor_id, asked)
        in_flight.settle(decision.executor_id, asked.request_id, accepted=True, now=1.0)
        placed[decision.executor_id] += 1
    assert set(placed) == set("abc")
    assert max(placed.values()) <= 5


def test_in_flight_requests_are_added_to_the_load() -> None:
    in_flight = InFlight()
    in_flight.send("e", request(100, request_id="1", tpot_ms=70.0))
    in_flight.send("e", request(20, request_id="2"))
    updated = in_flight.add_to(beat(num_waiting=1, waiting_prefill_tokens=5, promised_tpot_ms=(9.0,), free_pages=100)).executor
    assert updated == load(num_waiting=3, waiting_prefill_tokens=125, promised_tpot_ms=(9.0, 70.0), free_pages=100 - 7 - 2)
    assert in_flight.add_to(beat("other")) == beat("other")


@pytest.mark.parametrize("skew", [0.0, 1e9, -1e3])
def test_a_beat_takes_over_what_was_accepted_before_it_was_sent(skew: float) -> None:
    """Beats take 1 ms to arrive; the executor's clock is `skew` ahead of ours."""
    in_flight = InFlight()
    in_flight.observe_beat("e", 9.0 + skew, 9.001)
    for name in ("accepted", "pending", "refused"):
        in_flight.send("e", request(request_id=name))
    in_flight.settle("e", "refused", accepted=False, now=9.5)
    in_flight.settle("e", "accepted", accepted=True, now=9.6)
    assert len(in_flight) == 2
    in_flight.observe_beat("e", 10.0 + skew, 10.001)
    assert len(in_flight) == 1, "the executor may not have seen the pending one"
    in_flight.settle("e", "pending", accepted=True, now=10.5)
    in_flight.observe_beat("other", 11.0 + skew, 11.001)
    assert len(in_flight) == 1
    in_flight.observe_beat("e", 11.0 + skew, 11.001)
    assert len(in_flight) == 0


@pytest.mark.parametrize("skew", [0.0, 5.0, -5.0])
def test_a_beat_sent_before_the_acceptance_and_heard_after_it_takes_nothing_over(skew: float) -> None:
    in_flight = InFlight()
    in_flight.observe_beat("e", 9.0 + skew, 9.001)
    in_flight.send("e", request(tpot_ms=70.0))
    in_flight.settle("e", "r", accepted=True, now=10.1)
    in_flight.observe_beat("e", 10.0 + skew, 10.2)
    updated = in_flight.add_to(beat()).executor
    assert updated is not None
    assert (updated.num_waiting, updated.promised_tpot_ms) == (1, (70.0,))
    in_flight.observe_beat("e", 11.0 + skew, 11.3)
    assert in_flight.add_to(beat()) == beat()


def test_a_clock_that_was_set_back_is_forgiven_after_some_beats() -> None:
    in_flight = InFlight()
    in_flight.observe_beat("e", 1000.0, 0.0)
    in_flight.send("e", request())
    in_flight.settle("e", "r", accepted=True, now=0.5)
    for i in range(1, NUM_DELAYS):
        in_flight.observe_beat("e", float(i), float(i))
    assert len(in_flight) == 1
    in_flight.observe_beat("e", float(NUM_DELAYS), float(NUM_DELAYS))
    assert len(in_flight) == 0


def test_dead_executors_leave_nothing_in_flight() -> None:
    in_flight = InFlight()
    in_flight.send("dead", request())
    in_flight.send("living", request())
    in_flight.keep_only({"living"})
    assert len(in_flight) == 1
    in_flight.settle("dead", "r", accepted=True, now=1.0)
    assert len(in_flight) == 1
