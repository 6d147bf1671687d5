"""`heddle up`: model, NATS server and services, from nothing to ready, and down again. Knows processes and heartbeats."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from common import subjects
from common.bus import Bus
from common.messages import Beat, Role
from common.nats_server import NatsServer, NatsServerError
from common.service import redacted
from common.telemetry import configure_logging
from services.cli.layout import START_ORDER, Model, UpOptions, screen, service_specs
from services.cli.nats_once import connect_once
from services.cli.preflight import check_drafters, check_port, check_replicas, locked, prepare_model, say
from services.cli.supervisor import Child, ChildSpec, Supervisor

GRACE_S = 35.0
"""For each kind of service; longer than the drain period of any. An impatient user presses Ctrl-C again."""
NATS_START_S = 15.0
IMPATIENT_S = 60.0
"""How often a start that takes long says what it waits for."""
MAX_LOG_BYTES = 64 * 1024 * 1024
"""An hour or two of a busy executor, which logs every iteration."""
LOG_CHECK_S = 30.0


def up(options: UpOptions) -> None:
    """Run everything until a signal. Raises the error of whatever cannot be started."""
    configure_logging("heddle", "up", "error", "console")
    started_at = time.monotonic()
    check_replicas(options.replicas, options.nats)
    if options.has_planner:
        check_drafters(options.draft)
    if options.has_gateway:
        check_port(options.host, options.port)
    if options.nats_port is not None:
        check_port("127.0.0.1", options.nats_port, "--nats-port")
    with locked(options.state_dir):
        options.log_dir.mkdir(parents=True, exist_ok=True)
        model = prepare_model(options.model, options.served_model_name)
        asyncio.run(_Run(options, model, started_at).until_stopped())


def predecessor(log: Path) -> Path:
    """Where the older part of a log is kept."""
    return log.with_suffix(".log.1")


def trim_log(log: Path, max_bytes: int) -> None:
    """Move a log that has grown too long into its predecessor; the child, which appends, goes on at the file's start."""
    if log.stat().st_size > max_bytes:
        shutil.copyfile(log, predecessor(log))
        os.truncate(log, 0)


class _Run:
    """One life of `heddle up` on an event loop."""

    def __init__(self, options: UpOptions, model: Model, started_at: float) -> None:
        self._options = options
        self._model = model
        self._started_at = started_at
        self._stop = asyncio.Event()
        self._supervisor = Supervisor(say)
        self._services: list[tuple[Role, Child]] = []
        self._nats: list[Child] = []

    async def until_stopped(self) -> None:
        """Start, wait for readiness, show the screen, wait for a signal, stop everything."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        try:
            await self._unless_stopped(self._start())
            await self._unless_stopped(self._tend_logs())
        finally:
            if self._services:
                say("stopping: requests that run may finish; Ctrl-C again stops at once")
            stages = [[child for role, child in self._services if role == stage] for stage in reversed(START_ORDER)]
            await self._supervisor.stop([*stages, self._nats], GRACE_S)
            say("stopped")

    def _on_signal(self) -> None:
        if self._stop.is_set():
            say("stopping at once")
            self._supervisor.kill()
        self._stop.set()

    async def _unless_stopped(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do the work, or leave it when a signal comes. Raises StartupError when a child cannot be started."""
        task = asyncio.ensure_future(work)
        others = [asyncio.ensure_future(event.wait()) for event in (self._stop, self._supervisor.failed)]
        await asyncio.wait([task, *others], return_when=asyncio.FIRST_COMPLETED)
        for waiting in [task, *others]:
            waiting.cancel()
        outcome = await asyncio.gather(task, return_exceptions=True)
        if self._stop.is_set():
            return
        if self._supervisor.failure is not None:
            raise self._supervisor.failure
        if isinstance(outcome[0], BaseException):
            raise outcome[0]

    async def _start(self) -> None:
        nats_url = self._options.nats or await self._start_nats()
        bus = Bus(await connect_once(nats_url, "heddle-up"))
        try:
            ready = _Readiness(self._services)
            await bus.subscribe(subjects.ALL_BEATS, Beat, ready.on_beat)
            await bus.flush()
            for role, spec in service_specs(self._options, self._model, nats_url):
                self._services.append((role, self._add(spec)))
            await ready.wait()
        finally:
            await bus.drain()
        self._supervisor.mark_ready()
        names = [(child.spec.name, child.instance_id) for _, child in self._services]
        elapsed_s = time.monotonic() - self._started_at
        print(screen(self._options, self._model, redacted(nats_url), names, elapsed_s), flush=True)

    async def _start_nats(self) -> str:
        server = NatsServer(self._options.state_dir / "nats", self._options.nats_port or 0)
        self._nats.append(self._add(ChildSpec(name="nats", command=server.command(), log=self._options.log_dir / "nats.log")))
        deadline = time.monotonic() + NATS_START_S
        while not server.answers():
            if time.monotonic() > deadline:
                raise NatsServerError(f"nats-server does not answer on port {server.port}:\n{self._nats[0].log_tail()}")
            await asyncio.sleep(0.005)
        return server.url

    def _add(self, spec: ChildSpec) -> Child:
        if spec.log.exists():
            spec.log.replace(predecessor(spec.log))
        return self._supervisor.add(spec)

    async def _tend_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_S)
            for child in self._supervisor.children:
                try:
                    trim_log(child.spec.log, MAX_LOG_BYTES)
                except OSError as error:
                    say(f"cannot trim {child.spec.log}: {error.strerror}")


class _Readiness:
    """Waits until the present run of every child has said that it is ready."""

    def __init__(self, services: list[tuple[Role, Child]]) -> None:
        self._services = services
        self._ready_ids: set[str] = set()
        self._changed = asyncio.Event()

    async def on_beat(self, beat: Beat) -> None:
        """A heartbeat of any instance, also of other systems on the same server."""
        if beat.state == "ready":
            self._ready_ids.add(beat.instance_id)
            self._changed.set()

    async def wait(self) -> None:
        """Returns when all are ready; says now and then which are not."""
        while missing := [child for _, child in self._services if child.instance_id not in self._ready_ids]:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), IMPATIENT_S)
            except TimeoutError:
                say("still waiting for " + ", ".join(f"{child.spec.name} (log: {child.spec.log})" for child in missing))
