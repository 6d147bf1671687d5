"""The executor's side of speculation: who drafts for it, what it reports, how long it waits for trees. Knows the bus.

An iteration never depends on a planner: without one, or when its trees are late, sequences decode their roots alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container

import msgspec
import structlog
from nats.errors import Error as NatsError

from common import subjects
from common.bus import Bus, BusError
from common.cancellation import raise_if_cancelled
from common.fleet import Fleet
from common.messages import (
    Beat,
    DraftTrees,
    IterationReport,
    LatencyProfile,
    OpenedSequence,
    PlannerClaim,
    PlannerGranted,
    SequenceProgress,
)

log = structlog.get_logger()

MISSES_UNTIL_IMPATIENT = 3
"""After so many answers in a row that were late, the link asks for no drafts for a while: they would only take time from the
passes that they are too late for. With two cohorts it only waits no more, until trees arrive in time again."""
FIRST_QUIET, LONGEST_QUIET = 8, 64
"""Iterations of such a while; twice as many each time that the answers after it are late too. The first of them may well be:
drafters have to catch up."""
MAX_DEFERRED, MAX_DEFERRED_S = 8, 1.0
"""Iterations that one report may tell of while the planner rests, and their time: it has to see new debts in time."""
MAX_DEFERRED_BYTES = 1024 * 1024
"""Of their features: a report must fit into a message."""


class _Deferred:
    """What was done since the last report: of each sequence all its steps as one."""

    def __init__(self) -> None:
        self.num_iterations = self.num_bytes = 0
        self.is_drafted = False
        self._measured_s = 0.0
        self._num_measured = 0
        self._steps: dict[str, SequenceProgress] = {}

    def add(self, progress: tuple[SequenceProgress, ...], seconds: float | None) -> None:
        """An iteration that took so long; None if that tells nothing."""
        self.num_iterations += 1
        if seconds is not None:
            self._measured_s += seconds
            self._num_measured += 1
        for step in progress:
            self.num_bytes += len(step.features)
            self.is_drafted |= step.num_drafted > 0
            before = self._steps.get(step.request_id)
            self._steps[step.request_id] = step if before is None else joined(before, step)

    @property
    def measured_ms(self) -> float | None:
        """Mean of the iterations whose time tells something, if there are any."""
        return 1e3 * self._measured_s / self._num_measured if self._num_measured else None

    def progress(self, opened: Container[str]) -> tuple[SequenceProgress, ...]:
        """Of all sequences but those that are opened, with all their tokens."""
        return tuple(step for name, step in self._steps.items() if name not in opened)


def joined(first: SequenceProgress, second: SequenceProgress) -> SequenceProgress:
    """Two steps of a sequence, one after the other, as one."""
    return msgspec.structs.replace(
        second,
        tokens=(*first.tokens, *second.tokens),
        num_drafted=first.num_drafted + second.num_drafted,
        accepted_len=first.accepted_len + second.accepted_len,
        features=first.features + second.features,
    )


class PlannerLink:
    """Claims a planner, reports iterations to it and collects its trees."""

    def __init__(self, executor_id: str, model: str, max_wait_s: float, num_cohorts: int = 1) -> None:
        self.fingerprint = ""
        """Of the base model, for drafters that are trained for one."""
        self.granted: PlannerGranted | None = None
        """What the last planner that was claimed said."""
        self.planner_id: str | None = None
        self.mean_turnaround_ms = 0.0
        self.mean_wait_ms = 0.0
        """What getting drafts adds to an iteration that waits for them: less than a turnaround where other work goes on."""
        self.wait_ms = 0.0
        """All that it added so far."""
        self.num_overdue = 0
        """Trees that came when nobody waited for them any more."""
        self._executor_id = executor_id
        self._model = model
        self._max_wait_s = max_wait_s
        self._fleet = Fleet()
        self._reopen = False
        self._reported_at: dict[int, float] = {}
        """When the last iterations were reported, and those before them whose trees would still be on time."""
        self._num_cohorts = num_cohorts
        self._report_ms = 0.0
        self._resting_until = 0
        """The planner announced no drafts for the iterations up to this one."""
        self._misses = 0
        self._quiet_until, self._next_quiet = 0, FIRST_QUIET
        """No drafts are asked for after the iterations up to this one."""
        self._last: tuple[int, float] | None = None
        """The last iteration that was told of, and when."""
        self._deferred = _Deferred()
        self._answers: dict[int, DraftTrees] = {}
        self._arrived = asyncio.Event()

    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        """Listen for trees and planners' beats, and keep a planner claimed."""
        self._bus = bus
        await bus.subscribe(subjects.executor_trees(self._executor_id), DraftTrees, self._on_trees)
        await bus.subscribe(subjects.beat("planner", "*"), Beat, self._on_beat)
        tasks.create_task(self._keep_claimed())

    def is_quiet(self, iteration: int) -> bool:
        """Whether nobody drafts because of this iteration's report."""
        return self.planner_id is None or iteration <= max(self._resting_until, self._quiet_until)

    def takes_reopening(self) -> bool:
        """Whether the planner is new and must be told all decoding sequences; asked once per claim."""
        reopen, self._reopen = self._reopen, False
        return reopen

    async def report(
        self,
        iteration: int,
        *,
        opened: tuple[OpenedSequence, ...],
        closed: tuple[str, ...],
        progress: tuple[SequenceProgress, ...],
        token_budget: int,
        base_tokens: int,
        num_others: int,
        plain_ms: float,
        busy_ms: float,
        other_ms: float,
        is_mixed: bool,
        latency: LatencyProfile,
    ) -> None:
        """Tell the planner what an iteration did; it answers with the next one's trees. That takes `plain_ms` without them,
        `busy_ms` more with them and `other_ms` for prompts and training.

        `is_mixed` says that other work than decoding was done since the last iteration. While the planner rests, several
        iterations are told of at once, until a sequence begins or ends.
        """
        if self.planner_id is None:
            self._deferred = _Deferred()
            return
        now = time.perf_counter()
        before, self._last = self._last, (iteration, now)
        is_told = not is_mixed and self._num_cohorts == 1  # cohorts' iterations overlap
        seconds = now - before[1] if is_told and before is not None and before[0] == iteration - 1 else None
        self._deferred.add(progress, seconds)
        if not opened and not closed and self._may_defer(iteration, now):
            return
        deferred, self._deferred = self._deferred, _Deferred()
        report = IterationReport(
            executor_id=self._executor_id,
            iteration=iteration,
            opened=opened,
            closed=closed,
            progress=deferred.progress({sequence.request_id for sequence in opened}),
            token_budget=0 if iteration <= self._quiet_until else token_budget,
            base_tokens=base_tokens,
            num_others=num_others,
            t_spec_ms=plain_ms + busy_ms + other_ms + self.mean_wait_ms,
            measured_ms=deferred.measured_ms,
            num_iterations=deferred.num_iterations,
            wait_ms=self.mean_wait_ms,
            busy_ms=busy_ms,
            other_ms=other_ms,
            patience_ms=self._max_wait_s * 1e3,
            latency=latency,
        )
        last = set(list(self._reported_at)[len(self._reported_at) + 1 - self._num_cohorts :])
        kept = {number: at for number, at in self._reported_at.items() if number in last or now - at <= self._max_wait_s}
        self._reported_at = kept | {iteration: now}
        self._answers = {number: trees for number, trees in self._answers.items() if number in kept}
        try:
            await self._bus.publish(subjects.planner_report(self.planner_id), report)
        except (BusError, NatsError) as error:
            log.warning("planner.unreported", error=str(error) or type(error).__name__)
        self._report_ms = (time.perf_counter() - now) * 1e3

    def _may_defer(self, iteration: int, now: float) -> bool:
        """Whether the planner, which is not to draft, need not hear of it yet; drafts that were verified are judged at once."""
        deferred, reported_at = self._deferred, next(reversed(self._reported_at.values()), now)
        return (
            iteration < max(self._resting_until, self._quiet_until)
            and self._num_cohorts == 1
            and not deferred.is_drafted
            and deferred.num_iterations < MAX_DEFERRED
            and deferred.num_bytes < MAX_DEFERRED_BYTES
            and now - reported_at < MAX_DEFERRED_S
        )

    async def trees(self, iteration: int) -> DraftTrees | None:
        """The trees that answer the report of this iteration, waiting for them a little; None if they are late."""
        if self.planner_id is None or iteration not in self._reported_at:
            return None
        if self.is_quiet(iteration):
            return self._answers.get(iteration)
        started_at = time.perf_counter()
        if iteration not in self._answers and self._misses < MISSES_UNTIL_IMPATIENT:
            left_s = self._reported_at[iteration] + self._max_wait_s - time.perf_counter()
            try:
                async with asyncio.timeout(max(left_s, 0.0)):
                    while iteration not in self._answers:
                        self._arrived.clear()
                        await self._arrived.wait()
            except TimeoutError:
                self._miss(iteration)
        waited_ms = self._report_ms + (time.perf_counter() - started_at) * 1e3
        self.wait_ms += waited_ms
        self.mean_wait_ms += 0.1 * (waited_ms - self.mean_wait_ms)
        return self._answers.get(iteration)

    def _miss(self, iteration: int) -> None:
        self._misses += 1
        if self._misses >= MISSES_UNTIL_IMPATIENT and self._num_cohorts == 1:  # a cohort's drafts have the other one's pass
            self._misses, self._quiet_until = 0, iteration + self._next_quiet
            self._next_quiet = min(2 * self._next_quiet, LONGEST_QUIET)

    async def _on_trees(self, message: DraftTrees) -> None:
        reported_at = self._reported_at.get(message.iteration)
        if reported_at is None or message.planner_id != self.planner_id:
            self.num_overdue += len(message.trees)
            return
        turnaround_ms = (time.perf_counter() - reported_at) * 1e3
        self.num_overdue += len(message.trees) if turnaround_ms > self._max_wait_s * 1e3 else 0
        self._resting_until = message.iteration + message.num_resting
        if turnaround_ms <= self._max_wait_s * 1e3 and message.iteration > self._quiet_until:
            self._misses, self._next_quiet = 0, FIRST_QUIET
        self.mean_turnaround_ms += 0.1 * (turnaround_ms - self.mean_turnaround_ms)
        self._answers[message.iteration] = message
        self._arrived.set()

    async def _on_beat(self, beat: Beat) -> None:
        self._fleet.observe(beat, time.monotonic())
        if beat.instance_id == self.planner_id and beat.state != "ready":
            self._lose()

    def _lose(self) -> None:
        """The planner died or leaves; one that starts again under its old name has forgotten our sequences."""
        log.warning("planner.lost", planner=self.planner_id)
        self.planner_id = None

    async def _keep_claimed(self) -> None:
        while True:
            now = time.monotonic()
            ready = [beat.instance_id for beat in self._fleet.alive("planner", now) if beat.state == "ready"]
            if self.planner_id is not None and self.planner_id not in ready:
                self._lose()
            if self.planner_id is None and ready:
                await self._claim()
                raise_if_cancelled()
            await asyncio.sleep(0.25)

    async def _claim(self) -> None:
        claim = PlannerClaim(executor_id=self._executor_id, model=self._model, fingerprint=self.fingerprint)
        try:
            granted = await self._bus.request(subjects.CLAIM, claim, PlannerGranted, timeout_s=1.0)
        except BusError as error:
            log.warning("planner.claim_failed", error=str(error))
            return
        if not self._fleet.is_alive("planner", granted.planner_id, time.monotonic()):
            return
        self.granted = granted
        self.planner_id, self._reopen, self._misses, self._resting_until = granted.planner_id, True, 0, 0
        self._quiet_until, self._next_quiet = 0, FIRST_QUIET
        log.info("planner.claimed", planner=granted.planner_id)
