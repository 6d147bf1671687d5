"""What an executor tells its planner while that rests: several iterations at once, within bounds, without losing a token."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from typing import Any

import pytest

from common.messages import DraftTree, DraftTrees, IterationReport, LatencyProfile, OpenedSequence, SequenceProgress
from services.executor import planner_link
from services.executor.planner_link import MAX_DEFERRED, MAX_DEFERRED_BYTES, MISSES_UNTIL_IMPATIENT, PlannerLink

LATENCY = LatencyProfile(points=((1, 1.0), (2, 1.5)), ms_per_context_token=0.0)


@dataclasses.dataclass
class Wire:
    """The bus as a list of reports."""

    reports: list[IterationReport] = dataclasses.field(default_factory=list)

    async def publish(self, subject: str, message: IterationReport) -> None:
        """Keep it."""
        self.reports.append(message)


def step(name: str, tokens: tuple[int, ...], num_output: int, *, drafted: int = 0, num_bytes: int = 2) -> SequenceProgress:
    return SequenceProgress(
        request_id=name, tokens=tokens, num_drafted=drafted, accepted_len=len(tokens) - 1, num_output=num_output,
        decode_ms=10.0 * num_output, features=bytes([num_output]) * num_bytes,
    )  # fmt: skip


def opened(name: str) -> OpenedSequence:
    return OpenedSequence(request_id=name, tokens=(1, 2, 3), num_output=2, max_output=9)


@dataclasses.dataclass
class Executor:
    """A link to a planner that rests, and the iterations so far."""

    link: PlannerLink
    wire: Wire
    number: int = 0

    async def iterate(
        self, *progress: SequenceProgress, new: tuple[str, ...] = (), closed: tuple[str, ...] = (), is_mixed: bool = False
    ) -> None:
        """Report one more."""
        self.number += 1
        await self.link.report(
            self.number, opened=tuple(map(opened, new)), closed=closed, progress=progress, token_budget=8, base_tokens=1,
            num_others=0, plain_ms=5.0, busy_ms=0.0, other_ms=0.0, is_mixed=is_mixed, latency=LATENCY,
        )  # fmt: skip


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Executor:
    monkeypatch.setattr(planner_link, "MAX_DEFERRED_S", math.inf)
    link, wire = PlannerLink("executor", "model", max_wait_s=1.0), Wire()
    either: Any = wire
    link._bus, link.planner_id, link._resting_until = either, "planner", 1000
    return Executor(link, wire)


async def test_several_iterations_are_one_step_of_each_sequence(executor: Executor) -> None:
    for i in range(1, MAX_DEFERRED + 1):
        await executor.iterate(step("a", (i,), i), *([step("b", (i, -i), 2 * i)] if i > 2 else []))
    (report,) = executor.wire.reports
    assert (report.iteration, report.num_iterations) == (MAX_DEFERRED, MAX_DEFERRED)
    a, b = report.progress
    assert a.tokens == tuple(range(1, MAX_DEFERRED + 1))
    assert (a.num_output, a.decode_ms) == (MAX_DEFERRED, 10.0 * MAX_DEFERRED)
    assert a.features == b"".join(bytes([i]) * 2 for i in a.tokens)
    assert b.tokens == tuple(token for i in range(3, MAX_DEFERRED + 1) for token in (i, -i))
    await executor.iterate(step("a", (9,), 9))
    assert len(executor.wire.reports) == 1, "the next ones wait again"


async def test_what_begins_or_ends_is_told_at_once_with_what_waited(executor: Executor) -> None:
    await executor.iterate(step("a", (1,), 1), step("b", (1,), 1))
    await executor.iterate(step("a", (2,), 2), new=("b",))
    (report,) = executor.wire.reports
    assert [(each.request_id, each.tokens) for each in report.progress] == [("a", (1, 2))], "b comes with all its tokens"
    await executor.iterate(step("a", (3,), 3))
    await executor.iterate(closed=("a",))
    assert [(each.request_id, each.tokens) for each in executor.wire.reports[1].progress] == [("a", (3,))]


async def test_a_planner_that_does_not_rest_hears_of_each(executor: Executor) -> None:
    executor.link._resting_until = 2
    for i in range(1, 5):
        await executor.iterate(step("a", (i,), i))
    assert [(report.iteration, report.num_iterations) for report in executor.wire.reports] == [(2, 2), (3, 1), (4, 1)]


async def test_drafts_that_were_verified_are_told_at_once(executor: Executor) -> None:
    await executor.iterate(step("a", (1, 2), 2, drafted=3))
    await executor.iterate(step("a", (3,), 3))
    assert [report.iteration for report in executor.wire.reports] == [1]


async def test_bytes_and_time_bound_what_waits(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(1, 4):
        await executor.iterate(step("a", (i,), i, num_bytes=MAX_DEFERRED_BYTES // 3 + 1))
    assert [report.num_iterations for report in executor.wire.reports] == [3]
    monkeypatch.setattr(planner_link, "MAX_DEFERRED_S", 5.0)
    executor.link._reported_at = {executor.number: time.perf_counter() - 5.0}
    await executor.iterate(step("a", (4,), 4))
    assert [report.num_iterations for report in executor.wire.reports] == [3, 1]


async def test_time_is_the_mean_of_iterations_that_did_nothing_else(executor: Executor) -> None:
    """The first one of all has none before it."""
    for i in range(1, MAX_DEFERRED + 1):
        if i == 2:
            executor.link._last = (executor.number, (began_at := time.perf_counter() - 0.8))
        await executor.iterate(step("a", (i,), i))
    measured_ms = executor.wire.reports[0].measured_ms
    assert measured_ms is not None
    assert 800.0 <= (MAX_DEFERRED - 1) * measured_ms <= 1e3 * (time.perf_counter() - began_at)
    for i in range(1, MAX_DEFERRED + 1):
        if i == 3:  # so long, but it held a prompt
            executor.link._last = (executor.number, time.perf_counter() - 50.0)
        await executor.iterate(step("a", (i,), i), is_mixed=i == 3)
    measured_ms = executor.wire.reports[1].measured_ms
    assert measured_ms is not None
    assert (MAX_DEFERRED - 1) * measured_ms <= 1e3 * (time.perf_counter() - began_at)
    for i in range(1, MAX_DEFERRED + 1):
        await executor.iterate(step("a", (i,), i), is_mixed=True)
    assert executor.wire.reports[2].measured_ms is None


async def test_with_two_cohorts_late_trees_are_asked_for_on_and_waited_for_again_once_on_time(executor: Executor) -> None:
    """Drafts of one half have the other half's pass: nothing is gained without them."""
    link = executor.link
    link._num_cohorts, link._resting_until, link._max_wait_s = 2, 0, 0.01
    for i in range(1, MISSES_UNTIL_IMPATIENT + 2):
        await executor.iterate(step("a", (i,), i))
        assert await link.trees(i) is None
    assert link._misses == MISSES_UNTIL_IMPATIENT, "the last one was not waited for"
    assert all(report.token_budget > 0 for report in executor.wire.reports)
    link._max_wait_s = 60.0
    await link._on_trees(DraftTrees(planner_id="planner", iteration=executor.number, trees=()))
    await executor.iterate(step("a", (9,), 9))
    answer = DraftTrees(planner_id="planner", iteration=executor.number, trees=())
    waiting = asyncio.create_task(link.trees(executor.number))
    await asyncio.sleep(0)
    assert not waiting.done()
    await link._on_trees(answer)
    assert await waiting is answer


async def test_trees_that_come_when_nobody_waits_any_more_are_counted(executor: Executor) -> None:
    tree = DraftTree(request_id="a", length=4, tokens=(9, 8), parents=(-1, 0), probs=(1.0, 0.5))
    link = executor.link
    link._resting_until = 0
    await executor.iterate(step("a", (1,), 1))
    await link._on_trees(DraftTrees(planner_id="planner", iteration=1, trees=(tree, tree)))
    assert link.num_overdue == 0
    await link._on_trees(DraftTrees(planner_id="planner", iteration=7, trees=(tree, tree)))
    assert link.num_overdue == 2, "of an iteration that was not reported"
    await link._on_trees(DraftTrees(planner_id="another", iteration=1, trees=(tree, tree)))
    assert link.num_overdue == 4, "of a planner that is not ours"
    link._max_wait_s = 0.0
    await link._on_trees(DraftTrees(planner_id="planner", iteration=1, trees=(tree,)))
    assert link.num_overdue == 5


async def test_nothing_waits_for_a_planner_that_is_lost(executor: Executor) -> None:
    await executor.iterate(step("a", (1,), 1))
    executor.link._lose()
    await executor.iterate(step("a", (2,), 2))
    executor.link.planner_id = "other"
    await executor.iterate(step("b", (3,), 3), new=("a",))
    (report,) = executor.wire.reports
    assert [each.request_id for each in report.progress] == ["b"]
    assert report.num_iterations == 1
