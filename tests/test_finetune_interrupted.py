"""Finetuning alone goes in units that stop for whatever comes in: to the bit what whole passes make, and nothing is lost."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.native.build import library
from services.executor.backward_unit import BackwardUnit
from services.executor.finetune import new_job
from services.executor.forward_units import ForwardUnits
from services.executor.views import Limits
from tests.test_finetune_bitwise import JOBS, decoder, slices, undisturbed
from tests.tiny import Driver, random_prompt, serve, tiny_engine, tiny_request

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler, or no AVX2")

LIMITS = Limits(idle_iteration_ms=1.0, interruptible_ms=10_000.0, max_iteration_ms=6.0)
"""Alone, iterations of whole passes in units of some 20 rows; beside requests hardly more than a row."""


class Units(list[frozenset[str]]):
    """Whose units were done, in order; `before` is called ahead of each forward one."""

    before: Callable[[frozenset[str]], None] = staticmethod(lambda job_ids: None)


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Units:
    done = Units()
    forward, backward = ForwardUnits._unit, BackwardUnit.run

    def forward_unit(self: ForwardUnits, max_rows: int) -> float:
        job_ids = self.job_ids
        done.before(job_ids)
        work = forward(self, max_rows)
        done.append(job_ids)
        return work

    def backward_unit(self: BackwardUnit) -> None:
        backward(self)
        done.append(frozenset(window.cursor.adapter.name for window in self._windows))

    monkeypatch.setattr(ForwardUnits, "_unit", forward_unit)
    monkeypatch.setattr(BackwardUnit, "run", backward_unit)
    return done


def training(*job_ids: str) -> Driver:
    """Jobs that have all their slices."""
    engine = tiny_engine(copy.copy(decoder(torch.float32)), num_pages=512, limits=LIMITS)
    driver = Driver(engine)
    for job_id in job_ids:
        begin(driver, job_id)
    return driver


def begin(driver: Driver, job_id: str) -> None:
    job = new_job(job_id, JOBS[job_id][0], 7, driver.engine.decoder, driver.engine.cache)
    driver.engine.training.open(job, lease=1)
    for item in slices(job_id):
        driver.engine.training.accept(item)


def check(driver: Driver, *job_ids: str) -> None:
    """The rest of these jobs, and all they came to, is what each of them comes to alone and in whole passes."""
    driver.run(3000)
    for job_id in job_ids:
        steps = [dataclasses.astuple(event.step) for event in driver.events if event.job_id == job_id and event.step]
        held: Any = driver.engine.training.held(job_id, 1)
        expected_steps, expected_state, _ = undisturbed(torch.float32, job_id)
        assert steps == expected_steps
        assert held.checkpoint() == expected_state
    assert driver.engine.pages.num_free == driver.engine.pages.num_pages


def in_flight(driver: Driver) -> frozenset[str]:
    """Jobs whose pass is on its way."""
    return frozenset(view.job_id for view in driver.engine.training.views() if view.in_flight is not None)


def num_rows(*job_ids: str) -> int:
    """Of all sequences, up to the last predicted token."""
    items = [item for job_id in job_ids for item in slices(job_id)]
    return sum(max((i for i, weight in enumerate(item.weights) if weight), default=0) for item in items)


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_stopping_after_every_unit_changes_no_bit(is_interrupted: bool, units: Units) -> None:
    jobs = ("all", "ia3")
    driver = training(*jobs)
    driver.engine.has_news = lambda: is_interrupted
    counts, log = [], 0.0
    while driver.engine.has_work:
        before = len(units)
        driver.engine.forward_pass()
        work = driver.engine.backward_pass()
        driver.events += work.events
        log += work.units.num_tokens
        assert is_interrupted or bool(work.units.passed) == bool(work.units.num_tokens), "a pass did not go in one iteration"
        counts.append(len(units) - before)
    assert max(counts) == 1 if is_interrupted else max(counts) > 10
    assert frozenset(jobs) in units, "no unit was of all jobs"
    check(driver, *jobs)
    assert driver.engine.counters["finetune_tokens"] == num_rows(*jobs) == round(log, 6)
    assert driver.engine.counters["backward_tokens"] == num_rows(*jobs)


def test_a_request_that_comes_in_mid_pass_is_served_next_and_the_pass_goes_on_beside_it(units: Units) -> None:
    driver = training("all", "some")
    driver.engine.has_news = lambda: len(units) == 4
    assert driver.step().finetune_tokens == 0
    assert len(units) == 4, "it went on"
    request = tiny_request("r", random_prompt(9), 6)
    assert driver.engine.submit(request, None) is None
    assert driver.step().prefill_tokens == 9
    beside = 0
    while driver.engine.sequences:
        before, was_in_flight = len(units), bool(in_flight(driver))
        driver.step()
        beside += was_in_flight and len(units) > before
    assert beside > 2, "the pass did not go on beside the request"
    assert driver.streams.tokens == serve(decoder(torch.float32), request).streams.tokens
    check(driver, "all", "some")


@pytest.mark.parametrize("num_units", [1, 20])
def test_a_job_that_is_closed_mid_pass_takes_nothing_from_the_others(num_units: int, units: Units) -> None:
    """After 20 units, some rows of the pass have had their losses."""
    driver = training("all", "some")
    driver.engine.has_news = lambda: len(units) == num_units
    driver.step()
    assert in_flight(driver)
    driver.engine.training.close("all")
    assert not in_flight(driver)
    begin(driver, "all")
    check(driver, "all", "some")


def test_closing_between_plan_and_work_is_harmless(units: Units) -> None:
    driver = training("all", "some")
    driver.engine.forward_pass()
    driver.engine.training.close("all")
    assert not driver.engine.backward_pass().is_any
    assert not units
    check(driver, "some")


def test_a_job_that_makes_its_pass_fail_fails_alone(units: Units) -> None:
    driver = training("all", "some")

    def fault(job_ids: frozenset[str]) -> None:
        if "all" in job_ids and len(units) >= 3:
            raise RuntimeError("no such kernel")

    units.before = fault
    check(driver, "some")
    assert [(event.job_id, event.failure) for event in driver.events if event.failure] == [("all", "no such kernel")]
    assert driver.engine.training.held("all", 1) is None


def test_a_failure_that_was_no_jobs_doing_costs_no_job(units: Units) -> None:
    driver = training("all", "some")
    faults = [RuntimeError("once")]

    def fault(job_ids: frozenset[str]) -> None:
        if faults and len(units) >= 3:
            raise faults.pop()

    units.before = fault
    check(driver, "all", "some")
    assert frozenset({"all", "some"}) in units[6:], "they share passes again"


def test_a_pass_that_lacks_memory_begins_again_with_fewer_rows(units: Units) -> None:
    driver = training("all", "some")
    faults = [MemoryError()]

    def fault(job_ids: frozenset[str]) -> None:
        if faults and len(units) >= 3:
            raise faults.pop()

    units.before = fault
    driver.step()
    assert driver.engine.counters["passes_out_of_memory"] == 1
    assert driver.engine.limits.max_batch_tokens < num_rows("all", "some") // 3
    check(driver, "all", "some")
