"""Planners on a real bus, with executors played by the test."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from common import subjects
from common.bus import Bus
from common.messages import (
    Beat,
    DraftTrees,
    ExecutorLoad,
    IterationReport,
    LatencyProfile,
    OpenedSequence,
    PlannerClaim,
    PlannerGranted,
    SequenceProgress,
    ServiceState,
)
from common.nats_server import NatsServer
from services.planner.actor import PlannerActor, least_busy
from services.planner.config import PlannerConfig

Connect = Callable[[], Awaitable[Bus]]
LOOP = (1, 2, 3, 4) * 10
FLAT = LatencyProfile(points=((1, 30.0), (256, 31.0)))


class FakeExecutor:
    """Claims planners, reports to them, and collects their trees."""

    def __init__(self, bus: Bus, executor_id: str) -> None:
        self.bus = bus
        self.executor_id = executor_id
        self.answers: asyncio.Queue[DraftTrees] = asyncio.Queue()

    async def start(self) -> FakeExecutor:
        await self.bus.subscribe(subjects.executor_trees(self.executor_id), DraftTrees, self.answers.put)
        await self.bus.flush()
        return self

    async def claim(self) -> str:
        claim = PlannerClaim(executor_id=self.executor_id, model="m")
        return (await self.bus.request(subjects.CLAIM, claim, PlannerGranted)).planner_id

    async def report(
        self,
        planner_id: str,
        iteration: int,
        *,
        new: tuple[OpenedSequence, ...] = (),
        done: tuple[SequenceProgress, ...] = (),
    ) -> None:
        message = IterationReport(
            executor_id=self.executor_id,
            iteration=iteration,
            opened=new,
            progress=done,
            token_budget=16,
            base_tokens=1,
            t_spec_ms=30.0,
            latency=FLAT,
        )
        await self.bus.publish(subjects.planner_report(planner_id), message)

    async def answer(self) -> DraftTrees:
        return await asyncio.wait_for(self.answers.get(), 5)


def opened(request_id: str = "r") -> OpenedSequence:
    return OpenedSequence(request_id=request_id, tokens=LOOP, num_output=1, max_output=100)


def progress(tokens: tuple[int, ...], num_output: int) -> SequenceProgress:
    return SequenceProgress(
        request_id="r", tokens=tokens, num_drafted=3, accepted_len=len(tokens) - 1, num_output=num_output, decode_ms=1.0
    )


@asynccontextmanager
async def running(bus: Bus, **settings: object) -> AsyncIterator[PlannerActor]:
    """An actor that works on this bus, as in its service; its tasks end with the block."""
    actor = PlannerActor(PlannerConfig(**settings))  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        own = tasks.create_task(_hold(actor, bus, started := asyncio.Event()))
        await asyncio.wait_for(started.wait(), 5)
        yield actor
        own.cancel()


async def _hold(actor: PlannerActor, bus: Bus, started: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        await actor.start(bus, tasks)
        await bus.flush()
        started.set()
        await asyncio.Event().wait()


async def test_claim_report_trees(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="p") as actor:
        assert await executor.claim() == "p"
        await executor.report("p", 7, new=(opened(),))
        answer = await executor.answer()
        assert (answer.planner_id, answer.iteration) == ("p", 7)
        assert answer.trees[0].tokens[:4] == (4, 1, 2, 3)
        assert answer.answer_ms > 0
        vitals = actor.vitals()
        assert vitals.gauges["sequences"] == 1
        assert vitals.gauges["mean_answer_ms"] > 0
        assert vitals.counters["reports"] == 1
        assert vitals.counters["drafted_nodes"] == len(answer.trees[0].tokens) - 1
        assert vitals.counters["draft_ms"] > 0
        assert vitals.gauges["reliability_error"] == 0, "nothing was verified"
        await executor.report("p", 8, done=(progress((90,), 2),))
        await executor.answer()
        probs = answer.trees[0].probs[1:]
        assert actor.vitals().gauges["reliability_error"] == pytest.approx(sum(probs) / len(probs)), "none was accepted"
        assert vitals.counters["select_ms"] > 0


async def test_every_report_has_one_answer_in_order(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="p"):
        for iteration in range(40):
            await executor.report("p", iteration, new=(opened(),) if iteration >= 10 else ())
            answer = await executor.answer()
            assert (answer.iteration, bool(answer.trees)) == (iteration, iteration >= 10)


async def test_a_planner_that_falls_behind_drafts_for_the_last_reports_alone(bus: Bus, connect: Connect) -> None:
    """All are taken in and answered: the tokens of none are lost."""
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="p") as actor:
        await executor.report("p", 0, new=(opened(),))
        assert (await executor.answer()).trees
        for iteration in range(1, 21):
            await executor.report("p", iteration, done=(progress((iteration % 4 or 4,), 1 + iteration),))
        answers = [await executor.answer() for _ in range(20)]
        assert [answer.iteration for answer in answers] == list(range(1, 21))
        assert answers[-1].trees[0].length == len(LOOP) + 20
        assert actor.vitals().counters["stale_reports"] == sum(not answer.trees for answer in answers) > 2
        assert "lost_sequences" not in actor.vitals().counters


async def test_two_planners_share_the_claims(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="first"), running(await connect(), instance_id="second"):
        granted = {await executor.claim() for _ in range(40)}
        assert granted == {"first", "second"}


async def test_a_drained_planner_is_not_claimed_but_still_answers(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="first") as first, running(await connect(), instance_id="second"):
        await first.drain()
        assert {await executor.claim() for _ in range(20)} == {"second"}
        await executor.report("first", 1, new=(opened(),))
        assert (await executor.answer()).planner_id == "first"


async def test_several_executors_report_to_one_planner(bus: Bus, connect: Connect) -> None:
    executors = [await FakeExecutor(await connect(), name).start() for name in ("x", "y")]
    async with running(bus, instance_id="p") as actor:
        for executor in executors:
            await executor.report("p", 1, new=(opened(),))
        for executor in executors:
            assert len((await executor.answer()).trees) == 1
        assert actor.vitals().gauges["sequences"] == 2


async def test_a_claim_makes_the_planner_forget_what_it_knew(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="p"):
        await executor.report("p", 1, new=(opened(),))
        await executor.answer()
        await executor.claim()
        await executor.report("p", 9, done=(progress((1,), 2),))
        assert (await executor.answer()).trees == ()
        await executor.report("p", 10, new=(opened(),))
        assert len((await executor.answer()).trees) == 1


async def test_a_report_that_was_lost_costs_drafts_until_the_sequence_is_opened_again(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="p") as actor:
        await executor.report("p", 1, new=(opened(),))
        await executor.answer()
        await executor.report("p", 3, done=(progress((3, 4), 5),))
        answer = await executor.answer()
        assert (answer.trees, answer.unknown) == ((), ("r",))
        assert actor.vitals().counters["lost_sequences"] == 1
        again = OpenedSequence(request_id="r", tokens=(*LOOP, 1, 2, 3, 4), num_output=5, max_output=100)
        await executor.report("p", 4, new=(again,), done=(progress((3, 4), 5),))
        answer = await executor.answer()
        assert (len(answer.trees), answer.unknown) == (1, ())


async def test_a_malformed_report_does_not_stop_the_next(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, instance_id="p"):
        await executor.bus.publish_raw(subjects.planner_report("p"), b"\xc1garbage")
        await executor.report("p", 2, new=(opened(),))
        assert (await executor.answer()).iteration == 2
        assert bus.counters["malformed_messages"] == 1


async def until(condition: Callable[[], bool], message: str) -> None:
    """Wait for a condition that a background task brings about; fails after 5 s."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, message
        await asyncio.sleep(0.005)


async def test_an_executor_that_stops_beating_is_forgotten_and_one_that_beats_is_not(bus: Bus, connect: Connect) -> None:
    dead = await FakeExecutor(await connect(), "dead").start()
    living = await FakeExecutor(await connect(), "living").start()
    async with running(bus, instance_id="p", heartbeat_s=0.2) as actor:
        beat = Beat(role="executor", instance_id="living", state="ready", sent_at=0.0, period_s=60.0)
        await living.bus.publish(subjects.beat("executor", "living"), beat)
        await living.report("p", 1, new=(opened(),))
        await dead.report("p", 1, new=(opened(),))
        for answer in await asyncio.gather(living.answer(), dead.answer()):
            assert len(answer.trees) == 1
        await until(lambda: actor.vitals().gauges["sequences"] == 1, "the dead executor is still known")
        await living.report("p", 2, done=(progress((1,), 2),))
        assert len((await living.answer()).trees) == 1


async def test_an_executor_that_left_for_another_planner_is_forgotten(bus: Bus, connect: Connect) -> None:
    executor = await FakeExecutor(await connect(), "e").start()
    async with running(bus, heartbeat_s=0.02, forget_after_s=0.05, instance_id="p") as actor:
        beat = Beat(role="executor", instance_id="e", state="ready", sent_at=0.0, period_s=60.0)
        await executor.bus.publish(subjects.beat("executor", "e"), beat)
        await executor.report("p", 1, new=(opened(),))
        await executor.answer()
        await until(lambda: actor.vitals().gauges["sequences"] == 0, "the executor is still known")


async def test_the_process_starts_is_listed_and_stops_cleanly(nats_server: NatsServer, bus: Bus) -> None:
    ready = asyncio.Event()

    async def on_beat(beat: Beat) -> None:
        if beat.state == "ready":
            ready.set()

    await bus.subscribe(subjects.beat("planner", "proc"), Beat, on_beat)
    environment = os.environ | {"HEDDLE_NATS_URL": nats_server.url, "HEDDLE_INSTANCE_ID": "proc"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.planner", env=environment)
    try:
        await asyncio.wait_for(ready.wait(), 50)
        answer = await bus.client.request("$SRV.PING", b"", timeout=5)
        assert b'"heddle-planner"' in answer.data
        executor = await FakeExecutor(bus, "e").start()
        await executor.report(await executor.claim(), 1, new=(opened(),))
        assert len((await executor.answer()).trees) == 1
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("variable", ["HEDDLE_PLANNER_MODE", "HEDDLE_PLANNER_MOOD"])
async def test_a_wrong_setting_ends_the_process_with_a_message(variable: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.planner", env=os.environ | {variable: "fast"}, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), 50)
    assert process.returncode not in (0, None)
    assert b"heddle planner:" in errors
    assert b"Traceback" not in errors


def _planner_beat(planner_id: str, state: ServiceState = "ready") -> Beat:
    return Beat(role="planner", instance_id=planner_id, state=state, sent_at=0.0, period_s=1.0)


def _executor_beat(executor_id: str, planner_id: str) -> Beat:
    load = ExecutorLoad(
        model="m",
        adapters=(),
        max_model_len=64,
        page_size=16,
        num_pages=8,
        free_pages=8,
        num_running=0,
        num_waiting=0,
        waiting_prefill_tokens=0,
        context_tokens=0,
        promised_tpot_ms=(),
        latency=LatencyProfile(points=((1, 1.0),)),
        planner_id=planner_id,
    )
    return Beat(role="executor", instance_id=executor_id, state="ready", sent_at=0.0, period_s=1.0, executor=load)


def test_a_claim_goes_to_the_planner_with_fewest_executors() -> None:
    planners = [_planner_beat("a"), _planner_beat("b"), _planner_beat("c", state="draining")]
    executors = [_executor_beat("x", "a"), _executor_beat("y", "a"), _executor_beat("z", "b")]
    assert least_busy("a", "new", planners) == "a"
    assert least_busy("a", "new", planners + executors) == "b"
    assert least_busy("a", "z", planners + executors) == "b"
    assert least_busy("b", "y", [planners[1], *executors]) == "b"
