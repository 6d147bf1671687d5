"""A planner on the bus: is claimed by executors, answers each of their reports with trees. Decides nothing itself."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import structlog
from nats.aio.subscription import Subscription

from common import subjects
from common.bus import Bus
from common.fleet import MISSED_BEATS, Fleet
from common.messages import Beat, DraftTrees, IterationReport, PlannerClaim, PlannerGranted
from common.service import Vitals
from services.planner.config import PlannerConfig
from services.planner.drafters import make_drafter
from services.planner.modes import make_mode
from services.planner.planner import Planner, Shape

log = structlog.get_logger()

SMOOTHING = 0.05
"""Weight of the last report in the mean time of an answer."""


USEFUL_REPORTS = 2
"""An executor takes trees for its last report, or with two cohorts for its last two: older ones are drafted for in vain."""


class PlannerActor:
    """One of any number of planners; each follows the executors that claimed it."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._planner = make_planner(config)
        self._fleet = Fleet()
        self._mean_answer_ms = 0.0
        self._bus: Bus | None = None
        self._claims: Subscription | None = None
        self._reports: Subscription | None = None

    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        """Listen for reports, then offer to draft."""
        self._bus = bus
        await bus.subscribe(subjects.ALL_BEATS, Beat, self._on_beat)
        reports = subjects.planner_report(self._config.instance_id)
        self._reports = await bus.subscribe(reports, IterationReport, self._on_report)
        await bus.flush()
        self._claims = await bus.subscribe(subjects.CLAIM, PlannerClaim, self._on_claim, queue="planner")
        await bus.flush()
        tasks.create_task(self._sweep())

    async def drain(self) -> None:
        """Leave the queue group; reports are answered until the bus closes."""
        if self._claims is not None:
            await self._claims.drain()  # type: ignore[no-untyped-call]

    def vitals(self) -> Vitals:
        """What was drafted, chosen and accepted so far."""
        counts = self._planner.counters + self._planner.table.counters
        return Vitals(
            counters={name: float(count) for name, count in counts.items()},
            gauges={
                "sequences": float(len(self._planner.table)),
                "mean_answer_ms": self._mean_answer_ms,
                "reliability_error": self._planner.reliability_error,
            },
        )

    async def _on_beat(self, beat: Beat) -> None:
        if beat.role in ("executor", "planner"):
            self._fleet.observe(beat, time.monotonic())

    async def _on_claim(self, claim: PlannerClaim) -> PlannerGranted:
        """The executor opens all its sequences in its next report; what is known of them may be out of date."""
        self._planner.table.drop_executor(claim.executor_id)
        now = time.monotonic()
        beats = self._fleet.alive("planner", now) + self._fleet.alive("executor", now)
        granted = least_busy(self._config.instance_id, claim.executor_id, beats)
        log.info("planner.claimed", executor=claim.executor_id, model=claim.model, granted=granted)
        need = self._planner.need
        if need is None or need.fingerprint != claim.fingerprint:
            return PlannerGranted(planner_id=granted)
        return PlannerGranted(planner_id=granted, feature_layers=need.layers, feature_window=need.window)

    async def _on_report(self, report: IterationReport) -> None:
        """The executor waits for this answer. A planner that falls behind, as its drafter is slow, takes old reports in and
        drafts for the latest: else it would never catch up.
        """
        assert self._bus is not None
        assert self._reports is not None
        started_at = time.monotonic()
        is_stale = self._reports.pending_msgs >= USEFUL_REPORTS * max(1, self._planner.table.num_executors)
        drafted = self._planner.answer(report, started_at, is_stale=is_stale)
        answer_ms = 1000 * (time.monotonic() - started_at)
        self._mean_answer_ms += SMOOTHING * (answer_ms - self._mean_answer_ms)
        answer = DraftTrees(
            planner_id=self._config.instance_id,
            iteration=report.iteration,
            trees=drafted,
            answer_ms=answer_ms,
            unknown=self._planner.unknown(report),
            num_resting=self._planner.num_resting(report.executor_id),
        )
        await self._bus.publish(subjects.executor_trees(report.executor_id), answer)

    async def _sweep(self) -> None:
        """Forget executors that died, and those that went to another planner."""
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            now = time.monotonic()
            table, alive = self._planner.table, {beat.instance_id for beat in self._fleet.alive("executor", now)}
            gone = set(table.silent_since(now - MISSED_BEATS * self._config.heartbeat_s)) - alive
            for executor_id in gone | set(table.silent_since(now - self._config.forget_after_s)):
                log.info("planner.executor_forgotten", executor=executor_id, is_alive=executor_id in alive)
                table.drop_executor(executor_id)


def least_busy(own_id: str, executor_id: str, beats: list[Beat]) -> str:
    """The ready planner, the own one included, that fewest other executors name as theirs; the own one among equals."""
    drafts_for = Counter(
        beat.executor.planner_id for beat in beats if beat.executor is not None and beat.instance_id != executor_id
    )
    ready = {own_id} | {beat.instance_id for beat in beats if beat.role == "planner" and beat.state == "ready"}
    return min(ready, key=lambda planner_id: (drafts_for[planner_id], planner_id != own_id, planner_id))


def make_planner(config: PlannerConfig, clock: Callable[[], float] = time.perf_counter) -> Planner:
    """The planner that this configuration describes. `clock` (seconds) only measures how long drafting and selecting take."""
    mode = make_mode(config.mode)
    drafter = make_drafter(config, is_calibrated=mode is None or mode.is_calibrated, clock=clock)
    shape = Shape(
        min_depth=config.min_depth,
        max_depth=config.max_depth,
        max_width=config.max_width,
        draft_tokens=config.draft_tokens,
        depth_offset=config.depth_offset,
        width_offset=config.width_offset,
        min_prob=config.min_prob,
    )
    return Planner(drafter, mode, shape, clock)
