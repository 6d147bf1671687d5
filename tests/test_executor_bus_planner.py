"""An executor and its planner over a real bus: claims, reports, trees, planners that are late, forget or die."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common import subjects
from common.bus import Bus
from common.fingerprint import fingerprint
from common.fleet import MISSED_BEATS
from common.messages import Beat, DraftTree, DraftTrees, IterationReport, PlannerClaim, PlannerGranted, ServiceState
from services.executor import planner_link
from services.executor.engine import Iteration
from services.executor.planner_link import FIRST_QUIET, MAX_DEFERRED, MISSES_UNTIL_IMPATIENT
from tests.executor_stage import Connect, Gate, Mailbox, Stage, known_profile, running_executor, write_model
from tests.tiny import NUM_TOKENS, PROMPTS, tiny_request, truth

DEPTH = 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def profile(monkeypatch: pytest.MonkeyPatch) -> None:
    known_profile(monkeypatch)


@dataclass(kw_only=True)
class FakePlanner:
    """Drafts what it knows to come; `answers` decides about each report."""

    bus: Bus
    planner_id: str
    answers: Callable[[IterationReport], bool] = lambda report: True
    num_resting: int = 0
    forgets: set[str] = field(default_factory=set)
    state: ServiceState = "ready"
    period_s: float = 60.0
    """Long enough that no test's pause is taken for death."""
    num_beats: int = 0
    claims: Mailbox[PlannerClaim] = field(default_factory=Mailbox)
    reports: Mailbox[IterationReport] = field(default_factory=Mailbox)
    known: dict[str, list[int]] = field(default_factory=dict)
    num_prompt: dict[str, int] = field(default_factory=dict)

    async def start(self) -> None:
        """Listen."""
        await self.bus.subscribe(subjects.CLAIM, PlannerClaim, self._on_claim, queue="planner")
        await self.bus.subscribe(subjects.planner_report(self.planner_id), IterationReport, self._on_report)
        await self.bus.flush()
        await self.beat()

    async def beat(self) -> None:
        """One heartbeat."""
        self.num_beats += 1
        beat = Beat(role="planner", instance_id=self.planner_id, state=self.state, sent_at=time.time(), period_s=self.period_s)
        await self.bus.publish(subjects.beat("planner", self.planner_id), beat)

    async def beats(self) -> None:
        """Heartbeats for ever."""
        while True:
            await asyncio.sleep(self.period_s)
            await self.beat()

    def opened(self, request_id: str) -> int:
        """How often a sequence was opened here."""
        return sum(sequence.request_id == request_id for report in self.reports for sequence in report.opened)

    async def _on_claim(self, claim: PlannerClaim) -> PlannerGranted:
        await self.claims.put(claim)
        return PlannerGranted(planner_id=self.planner_id)

    async def _on_report(self, report: IterationReport) -> None:
        for sequence in report.opened:
            self.known[sequence.request_id] = list(sequence.tokens)
            self.num_prompt[sequence.request_id] = len(sequence.tokens) - sequence.num_output
        for step in report.progress:
            self.known[step.request_id] += step.tokens
        for request_id in report.closed:
            self.known.pop(request_id, None)
        if self.answers(report):
            await self.send(report)
        await self.reports.put(report)

    async def send(self, report: IterationReport) -> None:
        """Answer a report."""
        unknown, self.forgets = tuple(self.forgets), set()
        trees = tuple(self._tree(name) for name in self.known if name not in unknown)
        answer = DraftTrees(
            planner_id=self.planner_id,
            iteration=report.iteration,
            trees=() if self.num_resting else trees,
            unknown=unknown,
            num_resting=self.num_resting,
        )
        await self.bus.publish(subjects.executor_trees(report.executor_id), answer)

    def _tree(self, name: str) -> DraftTree:
        tokens = self.known[name]
        coming = truth()[name][len(tokens) - self.num_prompt[name] :][:DEPTH]
        nodes = (tokens[-1], *coming)
        parents, probs = tuple(range(-1, len(coming))), (1.0,) * len(nodes)
        return DraftTree(request_id=name, length=len(tokens), tokens=nodes, parents=parents, probs=probs)


@pytest.fixture
async def planner(connect: Connect) -> FakePlanner:
    return FakePlanner(bus=await connect(), planner_id="planner-1")


@contextlib.asynccontextmanager
async def claimed(connect: Connect, model_dir: Path, planner: FakePlanner, **settings: Any) -> AsyncIterator[Stage]:
    """An executor that has claimed this planner."""
    await planner.start()
    async with running_executor(connect, model_dir, tree_wait_ms=2000.0, **settings) as stage:
        await planner.beat()
        await has_claimed(stage, planner)
        yield stage


async def has_claimed(stage: Stage, planner: FakePlanner) -> None:
    """Returns when the executor drafts with this planner."""
    await stage.poll(lambda: stage.actor._planner.planner_id == planner.planner_id)


async def serve(stage: Stage, *names: str) -> None:
    """Requests of these names run to their ends, as transformers would have them."""
    for name in names:
        await stage.admit(tiny_request(name, PROMPTS[name], NUM_TOKENS))
    for name in names:
        assert await stage.output(name) == truth()[name]


async def test_trees_of_a_claimed_planner_save_iterations(connect: Connect, model_dir: Path, planner: FakePlanner) -> None:
    async with claimed(connect, model_dir, planner) as stage:
        assert planner.claims == [PlannerClaim(executor_id="executor-1", model="tiny", fingerprint=fingerprint(model_dir))]
        await serve(stage, "r3", "r4")
        await stage.settled()
        assert stage.load.planner_id == "planner-1"
        assert stage.counters()["accepted_tokens"] > NUM_TOKENS
        assert stage.counters()["trees_invalid"] == 0
        for name in ("r3", "r4"):
            usage = (await stage.end(name)).usage
            assert usage is not None
            assert usage.verify_steps <= -(-(NUM_TOKENS - 1) // (DEPTH + 1)) + 1
            assert usage.accepted_tokens >= usage.drafted_tokens - DEPTH > 0
        assert {planner.opened(name) for name in ("r3", "r4")} == {1}
        assert stage.actor.vitals().gauges["planner_turnaround_ms"] > 0
        assert (await planner.reports.first(lambda report: "r4" in report.closed)).iteration > 0
        assert planner.known == {}
        assert all(report.token_budget > 0 and report.t_spec_ms >= report.wait_ms >= 0 for report in planner.reports)
        assert all(report.t_spec_ms > report.wait_ms for report in planner.reports if report.base_tokens)
        assert planner.reports[-1].wait_ms > 0
        counters = stage.counters()
        assert all(counters[f"{part}_ms"] > 0 for part in ("verify", "commit", "send", "wait"))
        assert sum(counters[f"{part}_ms"] for part in ("verify", "commit", "send")) < counters["iteration_ms"]


async def test_without_speculation_no_planner_is_claimed(connect: Connect, model_dir: Path, planner: FakePlanner) -> None:
    await planner.start()
    async with running_executor(connect, model_dir, speculation=False) as stage:
        await planner.beat()
        await serve(stage, "r3")
        assert planner.claims == []
        assert stage.load.planner_id == ""


async def test_while_trees_come_late_none_are_asked_for_until_they_are_on_time_again(
    connect: Connect, model_dir: Path, planner: FakePlanner
) -> None:
    planner.answers = lambda report: False
    async with claimed(connect, model_dir, planner) as stage:
        stage.actor._planner._max_wait_s = 0.2
        await serve(stage, "r3")
        assert NUM_TOKENS > 2 * MISSES_UNTIL_IMPATIENT + FIRST_QUIET
        asked = [flag for each in planner.reports for flag in [each.token_budget > 0] * each.num_iterations]
        again = MISSES_UNTIL_IMPATIENT + FIRST_QUIET
        assert asked[:again] == [True] * MISSES_UNTIL_IMPATIENT + [False] * FIRST_QUIET
        assert asked[again : again + MISSES_UNTIL_IMPATIENT] == [True] * MISSES_UNTIL_IMPATIENT
        assert not any(asked[again + MISSES_UNTIL_IMPATIENT :])
        assert stage.actor._planner._next_quiet == 4 * FIRST_QUIET
        planner.answers = lambda report: True
        stage.actor._planner._max_wait_s = 2.0
        await stage.admit(tiny_request("r4", PROMPTS["r4"], NUM_TOKENS))
        assert await stage.output("r4") == truth()["r4"]
        await stage.settled()
        assert stage.counters()["accepted_tokens"] > 0
        assert stage.actor._planner._next_quiet == FIRST_QUIET


async def test_a_planner_that_rests_is_not_waited_for_and_says_when_it_drafts_again(
    connect: Connect, model_dir: Path, planner: FakePlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No report but the first is answered until the second was made: who waited for an answer would wait for ever."""
    monkeypatch.setattr(planner_link, "MAX_DEFERRED_S", math.inf)
    planner.num_resting = 2 * NUM_TOKENS
    planner.answers = lambda report: len(planner.reports) == 0
    async with claimed(connect, model_dir, planner) as stage:
        stage.actor._planner._max_wait_s = 1e6
        gate = Gate(stage.engine)
        await stage.admit(tiny_request("r3", PROMPTS["r3"], NUM_TOKENS))
        gate.let(NUM_TOKENS - 4)
        reports = await planner.reports.hold(2)
        assert stage.counters()["draft_tokens"] == 0
        first, second = reports
        assert first.measured_ms is None, "it held a prompt"
        assert second.measured_ms is not None
        assert second.measured_ms > 0
        assert second.num_iterations == second.iteration - first.iteration == MAX_DEFERRED < NUM_TOKENS - 4
        (progress,) = second.progress
        assert len(progress.tokens) == MAX_DEFERRED
        await stage.poll(lambda: stage.actor._planner._deferred.num_iterations == NUM_TOKENS - 4 - second.iteration)
        planner.num_resting = 0
        await planner.send(reports[-1])
        planner.answers = lambda report: True
        await stage.poll(lambda: stage.actor._planner._resting_until < reports[-1].iteration + 1)
        gate.open()
        assert await stage.output("r3") == truth()["r3"]
        await stage.settled()
        assert stage.counters()["accepted_tokens"] > 0


async def test_a_forgotten_sequence_is_opened_again(connect: Connect, model_dir: Path, planner: FakePlanner) -> None:
    async with claimed(connect, model_dir, planner) as stage:
        gate = Gate(stage.engine)
        await stage.admit(tiny_request("r3", PROMPTS["r3"], NUM_TOKENS))
        planner.forgets = {"r3"}
        gate.let()
        await planner.reports.hold(1)
        gate.let()
        reports = await planner.reports.hold(2)
        (again,) = reports[1].opened
        assert again.tokens == (*PROMPTS["r3"], *truth()["r3"][: again.num_output])
        assert again.num_output == 2
        assert reports[1].progress == ()
        gate.open()
        assert await stage.output("r3") == truth()["r3"]
        assert planner.opened("r3") == 2


async def test_requests_of_a_failed_pass_are_closed_at_the_planner(
    connect: Connect, model_dir: Path, planner: FakePlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with claimed(connect, model_dir, planner) as stage:
        gate = Gate(stage.engine)
        await stage.admit(tiny_request("r3", PROMPTS["r3"], NUM_TOKENS))
        gate.let()
        await planner.reports.hold(1)

        def fail() -> Iteration:
            monkeypatch.undo()
            raise RuntimeError("no")

        monkeypatch.setattr(stage.engine, "forward_pass", fail)
        gate.open()
        assert (await stage.end("r3")).finish_reason == "error"
        await serve(stage, "r4")
        await planner.reports.first(lambda report: "r3" in report.closed)
        assert "r3" not in planner.known


async def test_the_last_request_is_closed_at_the_planner_when_it_is_cancelled(
    connect: Connect, model_dir: Path, planner: FakePlanner
) -> None:
    async with claimed(connect, model_dir, planner) as stage:
        gate = Gate(stage.engine)
        await stage.admit(tiny_request("r3", PROMPTS["r3"], NUM_TOKENS))
        gate.let()
        await planner.reports.hold(1)
        await stage.cancel("r3")
        gate.open()
        await planner.reports.first(lambda report: "r3" in report.closed)
        assert not planner.known
        await serve(stage, "r4")


@pytest.mark.parametrize("death", ["silence", "restart"])
async def test_streams_go_on_when_the_planner_dies_and_another_is_claimed(
    connect: Connect, model_dir: Path, death: str, bus: Bus
) -> None:
    """Another that is there is claimed within three heartbeats of the last one (and the executor's look around), and what the
    executor accepts from then on are its trees: the stream that was drafted for before is drafted for again.
    """
    first = FakePlanner(bus=await connect(), planner_id="planner-1")
    second = FakePlanner(bus=bus, planner_id="planner-2", period_s=0.5)
    async with claimed(connect, model_dir, first) as stage:
        gate = Gate(stage.engine)
        await stage.admit(tiny_request("r3", PROMPTS["r3"], NUM_TOKENS))
        gate.let(2)
        await first.reports.hold(2)
        await stage.poll(lambda: gate.num_started == 3)  # with the trees of the second report
        stage.actor._planner._max_wait_s = 0.05
        await second.start()
        first.state, first.period_s = "starting" if death == "restart" else "ready", second.period_s
        await first.beat()  # the last one
        await first.bus.drain()
        num_beats = second.num_beats
        beating = asyncio.create_task(second.beats())
        gate.let(1)
        await stage.tokens_of("r3", 3)
        await stage.poll(lambda: stage.actor._planner.planner_id == second.planner_id)
        assert second.num_beats - num_beats <= (MISSED_BEATS if death == "silence" else 0) + 1
        assert stage.engine.counters["accepted_tokens"] == 2 * DEPTH, "the first planner's"
        stage.actor._planner._max_wait_s = 2.0
        gate.let(2)
        await stage.poll(lambda: stage.engine.counters["accepted_tokens"] >= 3 * DEPTH)
        gate.open()
        assert await stage.output("r3") == truth()["r3"]
        assert second.opened("r3") == 1
        assert second.reports[0].opened[0].num_decoded is not None
        beating.cancel()
