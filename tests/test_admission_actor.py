"""Admission on a real bus, with executors played by the test."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from nats.aio.subscription import Subscription

from common import subjects
from common.bus import Bus
from common.messages import (
    Admit,
    Admitted,
    Beat,
    Cancel,
    ErrorReply,
    ExecutorLoad,
    InferenceRequest,
    LatencyProfile,
    Rejected,
    ServiceState,
    Slo,
)
from common.nats_server import NatsServer
from services.admission.actor import AdmissionActor
from services.admission.config import AdmissionConfig
from services.admission.prefixes import page_keys

Connect = Callable[[], Awaitable[Bus]]
Reply = Admitted | Rejected | ErrorReply | None
ANSWER: Any = Admitted | Rejected
LOAD = ExecutorLoad(
    model="base",
    adapters=(),
    max_model_len=4000,
    page_size=16,
    num_pages=1000,
    free_pages=1000,
    num_running=0,
    num_waiting=0,
    waiting_prefill_tokens=0,
    context_tokens=0,
    promised_tpot_ms=(),
    latency=LatencyProfile(points=((1, 40.0), (101, 140.0))),
)


class FakeExecutor:
    """Accepts what admission sends, unless told otherwise; a silent one takes requests and never answers."""

    def __init__(self, bus: Bus, executor_id: str) -> None:
        self.bus = bus
        self.executor_id = executor_id
        self.orders: list[Admit] = []
        self.load = LOAD
        self.refusal: Rejected | ErrorReply | None = None
        self.is_silent = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.subscription: Subscription | None = None

    async def listen(self) -> FakeExecutor:
        subject = subjects.executor_admit(self.executor_id)
        self.subscription = await self.bus.subscribe(subject, Admit, self.on_admit, concurrent=True)
        await self.bus.flush()
        return self

    async def on_admit(self, order: Admit) -> Reply:
        self.orders.append(order)
        await self.gate.wait()
        if self.is_silent:
            return None
        return self.refusal or Admitted(request_id=order.request.request_id, executor_id=self.executor_id)

    async def beat(self, state: ServiceState = "ready") -> None:
        now = time.time()
        message = Beat(role="executor", instance_id=self.executor_id, state=state, sent_at=now, period_s=60.0)
        message = msgspec.structs.replace(message, executor=self.load)
        await self.bus.publish(subjects.beat("executor", self.executor_id), message)
        await self.bus.flush()


@asynccontextmanager
async def admission(bus: Bus, *beating: FakeExecutor, **settings: object) -> AsyncIterator[AdmissionActor]:
    """An admission that has joined, and has heard these executors."""
    config = {"heartbeat_s": 0.02, "admit_timeout_s": 5.0} | settings
    actor = AdmissionActor(AdmissionConfig(**config))  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        start = tasks.create_task(actor.start(bus, tasks))
        await hear(actor, beating)
        await start
        await bus.flush()
        yield actor


async def hear(actor: AdmissionActor, beating: tuple[FakeExecutor, ...]) -> None:
    """Beat until the actor knows all of these executors; it may not listen yet."""
    async with asyncio.timeout(5):
        while actor.vitals().gauges["executors"] < len(beating):
            for executor in beating:
                await executor.beat()
            await asyncio.sleep(0.002)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that a background task brings about; fails after 5 s."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def request(request_id: str = "r", num_tokens: int = 10, **changes: Any) -> InferenceRequest:
    arguments: dict[str, Any] = {"model": "base", "max_tokens": 5, "slo": Slo(tpot_ms=100.0)} | changes
    return InferenceRequest(request_id=request_id, prompt_tokens=(1,) * num_tokens, **arguments)


async def infer(bus: Bus, asked: InferenceRequest) -> Admitted | Rejected:
    answer: Admitted | Rejected = await bus.request(subjects.INFER, asked, ANSWER, 10)
    return answer


async def test_a_request_reaches_an_executor_with_its_deadline(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").listen()
    async with admission(bus, executor) as actor:
        asked = request(arrived_at=2e9, slo=Slo(tpot_ms=100.0, ttft_ms=500.0))
        assert await infer(await connect(), asked) == Admitted(request_id="r", executor_id="e")
        assert executor.orders == [Admit(request=asked, first_token_due_at=2e9 + 0.5)]
        assert actor.vitals().counters == {"admitted": 1, "best_effort": 0, "retried": 0, "expected_cached_tokens": 0}


async def test_a_request_without_arrival_time_arrives_now_and_without_target_has_no_deadline(
    bus: Bus, connect: Connect
) -> None:
    executor = await FakeExecutor(await connect(), "e").listen()
    async with admission(bus, executor):
        await infer(await connect(), request())
        assert executor.orders[0].request.arrived_at > 1.7e9
        assert executor.orders[0].first_token_due_at == 0.0


async def test_best_effort_is_told_and_counted(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").listen()
    async with admission(bus, executor) as actor:
        answer = await infer(await connect(), request(slo=Slo(tpot_ms=5.0)))
        assert answer == Admitted(request_id="r", executor_id="e", best_effort=True, attainable=False)
        assert actor.vitals().counters["best_effort"] == 1


async def test_refusals_are_typed_and_counted(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").listen()
    async with admission(bus, executor) as actor:
        client = await connect()
        asked = [request(model="nope"), request(num_tokens=0), request(num_tokens=5000)]
        reasons = [answer.reason for each in asked if isinstance(answer := await infer(client, each), Rejected)]
        assert reasons == ["unknown_model", "invalid", "too_long"]
        assert actor.vitals().counters == {"rejected_unknown_model": 1, "rejected_invalid": 1, "rejected_too_long": 1}
        assert executor.orders == []


async def test_without_executors_requests_are_told_to_come_back(bus: Bus, connect: Connect) -> None:
    async with admission(bus):
        answer = await infer(await connect(), request())
        assert isinstance(answer, Rejected)
        assert (answer.reason, answer.retry_after_ms > 0) == ("no_executor", True)


async def test_an_executor_that_is_gone_is_passed_over_and_forgotten(bus: Bus, connect: Connect) -> None:
    gone = FakeExecutor(await connect(), "a")
    living = await FakeExecutor(await connect(), "b").listen()
    async with admission(bus, gone, living) as actor:
        client = await connect()
        assert await infer(client, request()) == Admitted(request_id="r", executor_id="b")
        assert actor.vitals().counters["retried"] == 1
        assert actor.vitals().gauges["executors"] == 1
        await infer(client, request("second"))
        assert actor.vitals().counters["retried"] == 1
        await gone.beat()
        await hear(actor, (gone, living))


async def test_no_executor_left_after_one_is_gone(bus: Bus, connect: Connect) -> None:
    async with admission(bus, FakeExecutor(await connect(), "a")):
        answer = await infer(await connect(), request())
        assert isinstance(answer, Rejected)
        assert answer.reason == "no_executor"


@pytest.mark.parametrize("reason", ["overloaded", "draining"])
async def test_another_executor_is_asked_when_one_is_busy(bus: Bus, connect: Connect, reason: Any) -> None:
    busy, living = [await FakeExecutor(await connect(), name).listen() for name in ("a", "b")]
    busy.refusal = Rejected(reason=reason, message="not now", retry_after_ms=70)
    async with admission(bus, busy, living) as actor:
        client = await connect()
        assert await infer(client, request()) == Admitted(request_id="r", executor_id="b")
        assert (len(busy.orders), actor.vitals().counters["retried"]) == (1, 1)
        living.refusal = Rejected(reason=reason, message="neither", retry_after_ms=80)
        assert isinstance(answer := await infer(client, request("second")), Rejected)
        assert (answer.reason, answer.retry_after_ms) in ((reason, 70), (reason, 80))
        assert actor.vitals().gauges["in_flight"] <= 1


async def test_other_refusals_of_an_executor_are_final(bus: Bus, connect: Connect) -> None:
    strict, living = [await FakeExecutor(await connect(), name).listen() for name in ("a", "b")]
    strict.refusal = Rejected(reason="duplicate", message="runs already")
    async with admission(bus, strict, living):
        assert await infer(await connect(), request()) == strict.refusal
        assert living.orders == []


@pytest.mark.parametrize("failure", ["silent", "error"])
async def test_an_executor_that_may_have_taken_the_request_is_cancelled_and_nobody_else_asked(
    bus: Bus, connect: Connect, failure: str
) -> None:
    unsure, living = [await FakeExecutor(await connect(), name).listen() for name in ("a", "b")]
    unsure.is_silent = failure == "silent"
    unsure.refusal = ErrorReply(status=500, message="internal error") if failure == "error" else None
    cancelled: asyncio.Queue[Cancel] = asyncio.Queue()
    await unsure.bus.subscribe(subjects.ALL_CANCELS, Cancel, cancelled.put)
    await unsure.bus.flush()
    async with admission(bus, unsure, living, admit_timeout_s=0.1) as actor:
        answer = await infer(await connect(), request())
        assert isinstance(answer, Rejected)
        assert (answer.reason, answer.retry_after_ms > 0) == ("no_executor", True)
        assert await asyncio.wait_for(cancelled.get(), 5) == Cancel(request_id="r")
        assert living.orders == []
        assert actor.vitals().gauges == {"executors": 1, "in_flight": 0}
        actor._config = dataclasses.replace(actor._config, admit_timeout_s=10.0)  # the living one may take its time
        assert await infer(await connect(), request("again")) == Admitted(request_id="again", executor_id="b")


async def test_a_slow_executor_does_not_hold_up_other_requests(bus: Bus, connect: Connect) -> None:
    slow, quick = [await FakeExecutor(await connect(), name).listen() for name in ("a", "b")]
    slow.gate.clear()
    async with admission(bus, slow, quick):
        client = await connect()
        waiting = asyncio.create_task(infer(client, request("first")))
        await until(lambda: bool(slow.orders))
        assert await infer(client, request("second")) == Admitted(request_id="second", executor_id="b")
        assert not waiting.done()
        slow.gate.set()
        assert await waiting == Admitted(request_id="first", executor_id="a")


async def test_a_burst_spreads_over_executors_between_their_beats(bus: Bus, connect: Connect) -> None:
    executors = [await FakeExecutor(await connect(), name).listen() for name in ("a", "b", "c")]
    async with admission(bus, *executors) as actor:
        client = await connect()
        await asyncio.gather(*(infer(client, request(str(i), num_tokens=50)) for i in range(15)))
        assert [len(executor.orders) for executor in executors] == [5, 5, 5]
        assert actor.vitals().gauges["in_flight"] == 15
        for executor in executors:
            await executor.beat()
        await until(lambda: actor.vitals().gauges["in_flight"] == 0)


async def test_a_prompt_goes_where_its_beginning_is(bus: Bus, connect: Connect) -> None:
    """First because it was sent there, later because the executor says so, also to an admission that sent nothing."""
    first, second = [await FakeExecutor(await connect(), name).listen() for name in ("a", "b")]
    for executor in (first, second):
        executor.load = msgspec.structs.replace(LOAD, cached_pages=b"")
    client = await connect()
    async with admission(bus, first, second) as actor:
        for name in ("1", "2", "3"):
            assert await infer(client, request(name, num_tokens=400)) == Admitted(request_id=name, executor_id="a")
        other = await infer(client, request("other", num_tokens=400, cache_salt="x"))
        assert other == Admitted(request_id="other", executor_id="b")
        assert actor.vitals().counters["expected_cached_tokens"] == 2 * 384
        await actor.drain()  # else it would take a part of what the next one is asked
        await bus.flush()
    keys = b"".join(page_keys(request(num_tokens=400), LOAD))
    second.load = msgspec.structs.replace(LOAD, cached_pages=keys)
    async with admission(bus, first, second):
        assert await infer(client, request("4", num_tokens=400)) == Admitted(request_id="4", executor_id="b")


async def test_a_second_admission_joins_and_takes_work(connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").listen()
    async with admission(await connect(), executor) as first, admission(await connect(), executor) as second:
        client = await connect()
        answers = await asyncio.gather(*(infer(client, request(str(i))) for i in range(40)))
        assert all(isinstance(answer, Admitted) for answer in answers)
        shares = [each.vitals().counters["admitted"] for each in (first, second)]
        assert sum(shares) == 40
        assert min(shares) > 0


async def test_an_admission_listens_before_it_joins(connect: Connect) -> None:
    """The executors beat once a period; one that took requests earlier would turn away what they serve."""
    executor = await FakeExecutor(await connect(), "e").listen()
    client = await connect()
    actor = AdmissionActor(AdmissionConfig(heartbeat_s=0.2))
    async with asyncio.TaskGroup() as tasks:
        start = tasks.create_task(actor.start(await connect(), tasks))
        await hear(actor, (executor,))
        assert not start.done()
        await start
    assert isinstance(await infer(client, request()), Admitted)


async def test_a_drained_admission_finishes_what_it_has_and_leaves_the_rest(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").listen()
    executor.gate.clear()
    async with admission(bus, executor) as leaving, admission(await connect(), executor) as staying:
        client = await connect()
        waiting = [asyncio.create_task(infer(client, request(str(i)))) for i in range(10)]
        await until(lambda: len(executor.orders) == 10)
        await leaving.drain()
        more = [asyncio.create_task(infer(client, request(f"more{i}"))) for i in range(10)]
        executor.gate.set()
        assert all(isinstance(answer, Admitted) for answer in await asyncio.gather(*waiting, *more))
        assert staying.vitals().counters["admitted"] >= 10


async def test_the_process_starts_is_listed_takes_requests_and_stops_cleanly(nats_server: NatsServer, bus: Bus) -> None:
    ready = asyncio.Event()
    executor = await FakeExecutor(bus, "e").listen()

    async def on_beat(beat: Beat) -> None:
        if beat.role == "admission" and beat.instance_id == "proc":
            await executor.beat()
            if beat.state == "ready":
                ready.set()

    await bus.subscribe(subjects.ALL_BEATS, Beat, on_beat)
    settings = {"HEDDLE_NATS_URL": nats_server.url, "HEDDLE_INSTANCE_ID": "proc", "HEDDLE_ADMISSION_HEARTBEAT_S": "0.1"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.admission", env=os.environ | settings)
    try:
        await asyncio.wait_for(ready.wait(), 50)
        answer = await bus.client.request("$SRV.PING", b"", timeout=5)
        assert b'"heddle-admission"' in answer.data
        assert await infer(bus, request()) == Admitted(request_id="r", executor_id="e")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
