"""The forward passes that go in units: what is on its way, what it took, what becomes of one that fails. Knows no unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from common.latency import Rows
from services.executor.device import MIN_BATCH_TOKENS, is_out_of_memory, wait_for
from services.executor.forward_units import ForwardUnits
from services.executor.model import Decoder, KvCache
from services.executor.training_work import UnitWork, Window

Fail = Callable[[str, Exception], None]
"""Gives a job up."""


class InFlight:
    """Passes of all jobs; a job is in one of them at most. `clock` tells seconds."""

    def __init__(self, decoder: Decoder, cache: KvCache, clock: Callable[[], float]) -> None:
        self._decoder, self._cache, self._clock = decoder, cache, clock
        self._passes: list[ForwardUnits] = []
        self._suspects: set[str] = set()
        """Jobs of a pass that failed: until it is known whose doing it was, each has a pass of its own."""

    @property
    def jobs(self) -> dict[str, Rows]:
        """Whose windows are on their way, and what the latency model knows of the pass that they are in."""
        return {job_id: units.rows for units in self._passes for job_id in units.job_ids}

    def start(self, windows: Sequence[Window]) -> None:
        """Passes of these windows: one, but for jobs that may have made one fail."""
        for _, group in groupby(windows, lambda window: window.job_id if window.job_id in self._suspects else ""):
            self._passes.append(ForwardUnits(self._decoder, self._cache, list(group)))

    def drop(self, job_id: str) -> None:
        """Forget the pass that a job is in: its pages are let go. The windows of others in it begin again."""
        self._suspects.discard(job_id)
        self._passes = [units for units in self._passes if job_id not in units.job_ids]

    def advance(self, plan: Mapping[str, float], max_unit: float, is_stopped: Callable[[], bool], fail: Fail) -> UnitWork:
        """Let passes go on, each by what the plan has for its jobs, in tokens of a whole pass.

        One that fails is forgotten, and its windows begin again: each job's by themselves, and a job that fails by itself is
        given up; or, if it was its layers that lacked memory, fewer rows at a time.
        """
        work = UnitWork()
        for units in list(self._passes):
            job_ids = units.job_ids
            budget = sum(plan.get(job_id, 0.0) for job_id in job_ids)
            if budget <= 0 or (work.num_tokens and is_stopped()):
                continue
            is_whole, started_at = not units.has_begun, self._clock()
            try:
                num_tokens = units.advance(budget, max_unit, is_stopped)
                wait_for(self._decoder.device)
            except (RuntimeError, MemoryError) as error:
                self._passes.remove(units)
                if is_out_of_memory(error) and not units.is_at_head and units.rows.tokens > MIN_BATCH_TOKENS:
                    work = work._replace(num_lacking=units.rows.tokens)
                else:
                    self._suspect(units.job_ids, error, fail)
                num_tokens = 0.0
            ms = (self._clock() - started_at) * 1e3
            # One that was interrupted, or done in the small shares that requests leave, tells nothing of a pass in one go.
            passed = ((units.rows, ms),) if is_whole and units.is_through else ()
            work = UnitWork(work.num_tokens + num_tokens, work.ms + ms, work.passed + passed, work.num_lacking)
            if units.is_through:
                self._passes.remove(units)
                self._suspects -= job_ids
        return work

    def _suspect(self, job_ids: frozenset[str], error: Exception, fail: Fail) -> None:
        """One of these jobs made a pass fail, if it was a job."""
        self._suspects |= job_ids
        for job_id in job_ids if len(job_ids) == 1 else ():
            fail(job_id, error)
