"""The life of a service process: configuration, bus, heartbeats, micro-service registration, signals, drain. Knows no role."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import structlog
import uvloop
from nats import micro

from common import subjects
from common.bus import Bus
from common.config import EXIT_CONFIG, ConfigError, ServiceConfig, load_config
from common.messages import Beat, ExecutorLoad, Role, ServiceState
from common.settings_help import settings_help, usage
from common.telemetry import configure_logging

log = structlog.get_logger()
C = TypeVar("C", bound=ServiceConfig)
R = TypeVar("R")
CANCEL_AGAIN_S = 0.5
"""Time that a task has to end after a cancellation before it is told again."""


@dataclasses.dataclass(kw_only=True)
class Vitals:
    """What an actor says of itself in its heartbeats."""

    state: ServiceState = "ready"
    url: str = ""
    counters: dict[str, float] = dataclasses.field(default_factory=dict)
    gauges: dict[str, float] = dataclasses.field(default_factory=dict)
    executor: ExecutorLoad | None = None


class Actor(Protocol):
    """A service's behaviour. `start` subscribes; long-running work goes into `tasks`, whose failure ends the process."""

    async def start(self, bus: Bus, tasks: asyncio.TaskGroup) -> None:
        """Subscribe and begin to work; returns when work is accepted."""

    async def drain(self) -> None:
        """Take no new work, finish or hand over what runs; called once, before the process ends."""

    def vitals(self) -> Vitals:
        """State and load for the next heartbeat."""


def main(role: Role, config_type: type[C], make_actor: Callable[[C], Actor]) -> None:
    """Entry point of `python -m services.<role>`: runs until SIGTERM or SIGINT.

    A configuration error, now or while the actor starts, is one line on stderr and exit status EXIT_CONFIG. It takes no
    arguments but --help, which prints the settings.
    """
    _heed_arguments(role, config_type, sys.argv[1:])
    refusals: list[str] = []
    try:
        config = load_config(config_type, role)
        configure_logging(role, config.instance_id, config.log_level, config.log_format)
        log.info("service.starting", config=loggable(config))
        uvloop.run(serve(role, config, make_actor(config)))
    except* ConfigError as group:  # an actor's errors come in groups, and a group's handler cannot exit
        refusals = [" ".join(str(error).split()) for error in _leaves(group)]
    if refusals:
        print(f"heddle {role}: {refusals[0]}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)


def _heed_arguments(role: Role, config_type: type[ServiceConfig], arguments: Sequence[str]) -> None:
    """Exits when there are any."""
    if {"-h", "--help"} & set(arguments):
        print(settings_help(role, config_type))
        sys.exit(0)
    if arguments:
        print(f"heddle {role}: unknown argument {arguments[0]}; {usage(role)}", file=sys.stderr)
        sys.exit(os.EX_USAGE)


def _leaves(group: BaseExceptionGroup[ConfigError]) -> list[ConfigError]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


async def serve(role: Role, config: ServiceConfig, actor: Actor) -> None:
    """Run an actor until a signal asks to stop: starting -> ready -> draining. A failing task of the actor is raised."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    bus = await _unless_stopped(Bus.connect(config.nats_url, f"heddle-{role}-{config.instance_id}"), stop)
    if bus is None:
        return
    metadata = {"instance_id": config.instance_id, "host": socket.gethostname()}
    registration = await micro.add_service(bus.client, name=f"heddle-{role}", version=version("heddle"), metadata=metadata)
    heart = _Heart(role, config, actor, bus)
    try:
        async with _Workers() as tasks:
            tasks.create_task(heart.run())
            await _unless_stopped(actor.start(bus, tasks), stop)
            if not stop.is_set():
                await heart.enter(None)
                log.info("service.ready")
                await stop.wait()
                await heart.enter("draining")
                log.info("service.draining")
                await actor.drain()
            await tasks.cancel_all()
    finally:
        await registration.stop()
        await bus.drain()
    log.info("service.stopped")


async def _unless_stopped(work: Coroutine[Any, Any, R], stop: asyncio.Event) -> R | None:
    """What the work returns; None if the process was told to stop first."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        stopping.cancel()
        return task.result()
    await _cancel_all({task})
    return None


async def _cancel_all(tasks: set[asyncio.Task[Any]]) -> None:
    """Return when none of them runs any more. They are told again if need be: Python 3.11's wait_for, which the NATS client
    awaits its replies with, may drop a cancellation that arrives together with the reply.
    """
    while running := {task for task in tasks if not task.done()}:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)


def loggable(config: ServiceConfig) -> dict[str, Any]:
    """The settings without credentials: fields with the metadata `secret` only say whether they are set."""
    secrets = {field.name for field in dataclasses.fields(config) if field.metadata.get("secret")}
    hidden = {name: "(set)" for name in secrets if getattr(config, name)}
    return dataclasses.asdict(config) | hidden | {"nats_url": redacted(config.nats_url)}


def redacted(url: str) -> str:
    """The URL without credentials."""
    scheme, _, rest = url.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]


class _Workers(asyncio.TaskGroup):
    """A task group whose tasks can be told to stop, and that ends when one of them fails though others lose a cancellation."""

    def __init__(self) -> None:
        super().__init__()
        self._running: set[asyncio.Task[Any]] = set()

    def create_task(self, *args: Any, **options: Any) -> asyncio.Task[Any]:
        """As TaskGroup.create_task."""
        task: asyncio.Task[Any] = super().create_task(*args, **options)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def cancel_all(self) -> None:
        """Return when no task runs any more."""
        await _cancel_all(self._running)

    async def __aexit__(self, *error: Any) -> None:
        """As TaskGroup's, which cancels its tasks once when one fails, and would wait for ever for one that missed it."""
        insisting = asyncio.ensure_future(self._insist()) if error[0] is not None else None
        try:
            await super().__aexit__(*error)
        finally:
            if insisting is not None:
                insisting.cancel()

    async def _insist(self) -> None:
        await asyncio.sleep(CANCEL_AGAIN_S)
        await self.cancel_all()


class _Heart:
    """Sends beats; `override` replaces the actor's own state while it starts and drains."""

    def __init__(self, role: Role, config: ServiceConfig, actor: Actor, bus: Bus) -> None:
        self._role = role
        self._config = config
        self._actor = actor
        self._bus = bus
        self._override: ServiceState | None = "starting"

    async def enter(self, override: ServiceState | None) -> None:
        """Change state and tell at once."""
        self._override = override
        await self._beat()

    async def run(self) -> None:
        """Beat for ever, once a period."""
        while True:
            await self._beat()
            await asyncio.sleep(self._config.heartbeat_s)

    async def _beat(self) -> None:
        vitals = self._actor.vitals()
        beat = Beat(
            role=self._role,
            instance_id=self._config.instance_id,
            state=self._override or vitals.state,
            sent_at=time.time(),
            period_s=self._config.heartbeat_s,
            url=vitals.url,
            counters=vitals.counters | {name: float(count) for name, count in self._bus.counters.items()},
            gauges=vitals.gauges,
            executor=vitals.executor,
        )
        await self._bus.publish(subjects.beat(self._role, self._config.instance_id), beat)
