"""Two halves of the decoding requests that verify in turns: who decodes when, what plans make of it, and whose drafts count."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from common.messages import IterationReport, LoraSpec, OptimizerStep
from common.sharing import parse_sharing
from services.executor.cohorts import Cohorts
from services.executor.finetune import new_job
from services.executor.views import Limits, SequenceView
from tests.executor_stage import Connect, known_profile, running_executor, write_model
from tests.helpers import training_slice
from tests.plans import decoding, plan, waiting
from tests.test_executor_bus_planner import FakePlanner, has_claimed, serve
from tests.tiny import NUM_TOKENS, random_prompt, tiny_engine, tiny_pair, tiny_request


def active(views: list[SequenceView]) -> set[str]:
    return {view.request_id for view in views if view.is_decoding and not view.is_resting}


def turn(cohorts: Cohorts, views: list[SequenceView], iteration: int) -> set[str]:
    """An iteration in which all that may decode do."""
    chosen = active(cohorts.take_turns(views, iteration))
    cohorts.decoded(chosen, iteration)
    return chosen


def test_one_cohort_decodes_everyone_each_time() -> None:
    cohorts = Cohorts()
    for i in range(1, 4):
        assert turn(cohorts, [decoding("a"), decoding("b"), waiting("c", 5)], i) == {"a", "b"}
        assert cohorts.awaited(["a", "b"], i) == i


def test_two_cohorts_take_turns_and_wait_for_the_drafts_of_their_own_report() -> None:
    cohorts = Cohorts(2)
    views = [decoding(name) for name in "abcde"]
    first, second = turn(cohorts, views, 1), turn(cohorts, views, 2)
    assert first | second == set("abcde")
    assert not first & second
    assert {len(first), len(second)} == {2, 3}
    assert cohorts.awaited("abcde", 2) == 1, "the next pass verifies what answers the first iteration's report"
    assert turn(cohorts, views, 3) == first
    assert cohorts.awaited("abcde", 3) == 2


def test_a_lone_request_decodes_each_time_and_waits_for_its_last_report() -> None:
    cohorts = Cohorts(2)
    for i in range(1, 4):
        assert turn(cohorts, [decoding("a")], i) == {"a"}
        assert cohorts.awaited(["a"], i) == i


def test_nobody_rests_twice_in_a_row_however_requests_come_and_go() -> None:
    rng, cohorts, running, rested, number = random.Random(0), Cohorts(2), set[str](), set[str](), 0
    for i in range(1, 500):
        running = {name for name in running if rng.random() > 0.1}
        while rng.random() < 0.4:
            running.add(f"r{(number := number + 1)}")
        chosen = turn(cohorts, [decoding(name) for name in sorted(running)], i)
        assert chosen or not running
        assert not (running - chosen) & rested
        rested = running - chosen
    assert number > 100


def test_the_plan_leaves_resting_requests_out_and_halves_the_slack() -> None:
    one, other = decoding("a", tpot_ms=100.0), decoding("b", tpot_ms=100.0)
    together, in_turns = plan(one, other), plan(one, dataclasses.replace(other, is_resting=True))
    assert set(in_turns.decode) == {"a"}
    assert in_turns.rows == plan(one).rows
    assert in_turns.limit_ms == pytest.approx(together.limit_ms / 2)
    assert plan(one, dataclasses.replace(other, is_resting=True, tpot_ms=40.0)).limit_ms < in_turns.limit_ms


@pytest.mark.parametrize("num_passes", [2, 3], ids=lambda num: f"{num}-passes")
def test_a_half_whose_turn_a_mini_batch_took_is_next(num_passes: int) -> None:
    """One iteration of inference, then all of a step of finetuning, again and again: both halves go on."""
    decoder = copy.copy(tiny_pair()[1])
    num_rows = 32 * (num_passes - 1)  # forward in passes of 32 rows, and all the way back in one iteration
    settings: dict[str, Any] = {"num_cohorts": 2, "sharing": parse_sharing("temporal:1"), "num_pages": 512}
    engine = tiny_engine(decoder, limits=Limits(max_batch_tokens=32), **settings)
    engine.training.open(new_job("job", LoraSpec(rank=2), 0, decoder, engine.cache), lease=1)
    for step in range(20):
        update = OptimizerStep(learning_rate=1e-3)
        engine.training.accept(training_slice(random_prompt(num_rows + 1), step=step, optimizer=update))
    for name in ("a", "b"):
        engine.submit(tiny_request(name, random_prompt(3), 40), None)
    for _ in range(10 * (num_passes + 1)):
        engine.forward_pass()
        engine.backward_pass()
    counts = [sequence.num_output for sequence in engine.sequences.values()]
    assert min(counts) > 3
    assert max(counts) - min(counts) <= 2


class SlowPlanner(FakePlanner):
    """Answers each report only after the next one has come: too late for anyone who decodes in every pass."""

    last: IterationReport | None = None

    async def _on_report(self, report: IterationReport) -> None:
        self.answers = lambda _: False
        await super()._on_report(report)
        if self.last is not None:
            await self.send(self.last)
        self.last = report


async def test_drafts_that_take_a_pass_are_on_time_for_the_other_half(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_profile(monkeypatch)
    planner = SlowPlanner(bus=await connect(), planner_id="planner-1")
    await planner.start()
    async with contextlib.AsyncExitStack() as stack:
        settings = {"cohorts": 2, "tree_wait_ms": 60.0}
        stage = await stack.enter_async_context(running_executor(connect, write_model(tmp_path / "tiny"), **settings))
        await planner.beat()
        await has_claimed(stage, planner)
        await serve(stage, "r3", "r4")
        for name in ("r3", "r4"):
            usage = (await stage.end(name)).usage
            assert usage is not None
            assert usage.accepted_tokens > NUM_TOKENS // 2
