"""The trainer's actor: joins the bus, hears executors' beats, answers the API, starts the dispatcher. Decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from common import subjects
from common.bus import Bus
from common.chat import ChatTokenizer
from common.fleet import Fleet
from common.messages import Beat
from common.service import Vitals
from services.trainer import events
from services.trainer.artifacts import Artifacts
from services.trainer.config import TrainerConfig
from services.trainer.dispatcher import Dispatcher
from services.trainer.endpoints import Endpoints
from services.trainer.event_log import EventLog
from services.trainer.job_table import JobTable
from services.trainer.surroundings import Surroundings


class TrainerActor:
    """Keeps finetuning jobs and drives some of them."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._tokenizer = ChatTokenizer.load(config.model_dir)
        self._fleet = Fleet()
        self._counters = Counter(steps=0, trained_tokens=0, jobs_succeeded=0, jobs_failed=0)
        self._dispatcher: Dispatcher | None = None

    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        """Open the stores, answer the API, and begin to claim jobs."""
        around = Surroundings(
            bus=bus,
            config=self._config,
            tokenizer=self._tokenizer,
            table=await JobTable.open(bus),
            events=await EventLog.open(bus),
            artifacts=Artifacts(bus, self._config.request_timeout_s),
            fleet=self._fleet,
            counters=self._counters,
        )
        await bus.subscribe(subjects.beat("executor", "*"), Beat, self._on_beat)
        await Endpoints(around).subscribe()
        self._dispatcher = Dispatcher(around, tasks)
        self._dispatcher.start()

    async def drain(self) -> None:
        """Claim no more jobs and hand over those that run."""
        if self._dispatcher is not None:
            await self._dispatcher.drain()

    def vitals(self) -> Vitals:
        """Counts of jobs and steps."""
        running = self._dispatcher.num_running if self._dispatcher else 0
        queued = self._dispatcher.num_queued if self._dispatcher else 0
        steps = self._dispatcher.last_steps if self._dispatcher else []
        return Vitals(
            counters={name: float(count) for name, count in self._counters.items()},
            gauges={"jobs_running": float(running), "jobs_queued": float(queued), **events.gauges(steps)},
        )

    async def _on_beat(self, beat: Beat) -> None:
        self._fleet.observe(beat, time.monotonic())
