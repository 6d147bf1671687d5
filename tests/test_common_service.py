"""The life of a service process: beats, signals at any moment, tasks that do not stop at the first word."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any, get_args

import pytest

from common import bus as bus_module
from common import subjects
from common.bus import Bus
from common.config import ServiceConfig
from common.messages import Beat, Role, ServiceState
from common.nats_server import NatsServer, free_port
from common.service import _Workers
from common.settings_help import settings_help
from common.telemetry import Repetition
from tests.executor_stage import Mailbox

ROLES: tuple[Role, ...] = get_args(Role)
SERVICE = """
import asyncio
from common.config import ServiceConfig
from common.service import Vitals, main

async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if "again" in seen:
                raise
            seen.append("again")

seen = []

class Actor:
    def __init__(self, config): pass
    async def start(self, bus, tasks):
        START
    async def drain(self):
        print("drained", flush=True)
    def vitals(self):
        return Vitals(counters={"things": 3.0}, gauges={"load": 0.5})

main("planner", ServiceConfig, Actor)
"""


@contextlib.asynccontextmanager
async def service(url: str, start: str = "pass") -> AsyncIterator[asyncio.subprocess.Process]:
    """A service of its own process; killed if it is still there at the end."""
    environ = {**os.environ, "HEDDLE_NATS_URL": url, "HEDDLE_INSTANCE_ID": "p1", "HEDDLE_HEARTBEAT_S": "0.1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVICE.replace("START", start),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def read_until(process: asyncio.subprocess.Process, word: bytes) -> bytes:
    """The log up to the line with this word."""
    assert process.stderr is not None
    log = b""
    async with asyncio.timeout(20):
        while word not in log:
            line = await process.stderr.readline()
            assert line, log
            log += line
    return log


async def stopped(process: asyncio.subprocess.Process, number: int = signal.SIGTERM) -> tuple[int | None, bytes, bytes]:
    """Exit code and the rest of the output after a signal."""
    process.send_signal(number)
    printed, log = await asyncio.wait_for(process.communicate(), 20)
    assert b"Traceback" not in log, log
    return process.returncode, printed, log


@pytest.fixture
async def beats(bus: Bus) -> Mailbox[Beat]:
    found: Mailbox[Beat] = Mailbox()
    await bus.subscribe(subjects.ALL_BEATS, Beat, found.put)
    await bus.flush()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_service_beats_through_its_life(nats_server: NatsServer, beats: Mailbox[Beat], number: int) -> None:
    async with service(nats_server.url) as process:
        ready = await beats.first(lambda beat: beat.state == "ready")
        assert (ready.role, ready.instance_id, ready.period_s) == ("planner", "p1", 0.1)
        assert (ready.counters["things"], ready.gauges) == (3.0, {"load": 0.5})
        code, printed, log = await stopped(process, number)
    assert (code, printed) == (0, b"drained\n")
    assert b"service.stopped" in log
    await beats.first(lambda beat: beat.state == "draining")
    states: list[ServiceState] = [beat.state for beat in beats]
    assert states == sorted(states, key=["starting", "ready", "draining"].index)


async def test_a_signal_before_the_bus_is_there_ends_the_process() -> None:
    async with service(f"nats://127.0.0.1:{free_port()}") as process:
        await read_until(process, b"bus.error")
        code, printed, _ = await stopped(process)
    assert (code, printed) == (0, b"")


@pytest.mark.parametrize("start", ["await asyncio.sleep(60)", "tasks.create_task(stubborn()); await stubborn()"])
async def test_a_signal_during_start_ends_the_process(nats_server: NatsServer, beats: Mailbox[Beat], start: str) -> None:
    async with service(nats_server.url, start) as process:
        await beats.first(lambda beat: beat.state == "starting")
        code, printed, log = await stopped(process)
    assert (code, printed) == (0, b""), "what has not started is not drained"
    assert b"service.ready" not in log
    assert b"service.stopped" in log


async def test_a_task_that_loses_a_cancellation_is_stopped(nats_server: NatsServer, beats: Mailbox[Beat]) -> None:
    async with service(nats_server.url, "tasks.create_task(stubborn())") as process:
        await beats.first(lambda beat: beat.state == "ready")
        code, printed, _ = await stopped(process)
    assert (code, printed) == (0, b"drained\n")


FAIL = """
        async def fail():
            await asyncio.sleep(0.2)
            raise LookupError("the device is gone")
        tasks.create_task(stubborn())
        tasks.create_task(fail())
"""


async def test_a_failing_task_ends_the_process_even_if_another_loses_its_cancellation(nats_server: NatsServer) -> None:
    async with service(nats_server.url, FAIL.strip()) as process:
        _, log = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"the device is gone" in log


async def swallow(num_times: int) -> None:
    """A task that survives so many cancellations."""
    for _ in range(num_times):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    await asyncio.Event().wait()


async def test_workers_cancel_until_nothing_runs() -> None:
    async with asyncio.timeout(10):
        async with _Workers() as tasks:
            running: list[asyncio.Task[Any]] = [tasks.create_task(swallow(times)) for times in (0, 1, 2)]
            await asyncio.sleep(0)
            await tasks.cancel_all()
            assert all(task.done() for task in running)


class Told(list[str]):
    """A log of warnings, whatever level the process logs at."""

    def warning(self, event: str, *, error: str, **_: object) -> None:
        self.append(f"{event} {error}")


async def test_an_error_that_repeats_is_told_ever_more_seldom(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(bus_module, "log", told)
    bus = await Bus.connect(nats_server.url, "test")
    on_error = bus.client._error_cb
    for _ in range(50):
        await on_error(ConnectionRefusedError("nobody there"))
    await on_error(ConnectionRefusedError("not welcome"))
    await on_error(TimeoutError())
    await bus.drain()
    assert told == ["bus.error nobody there", "bus.error not welcome", "bus.error TimeoutError"]


def test_repetitions_are_told_at_intervals_that_double_until_there_is_a_pause() -> None:
    repetition = Repetition()
    told = [quarter / 4 for quarter in range(0, 4 * 200) if repetition.is_due(quarter / 4)]
    assert told == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    assert repetition.num_hidden == 800 - len(told)
    assert repetition.is_due(261.0)
    assert not repetition.is_due(261.5)
    assert repetition.is_due(262.0)


@pytest.mark.parametrize("role", ROLES)
def test_help_lists_every_setting_and_starts_nothing(role: Role) -> None:
    module = importlib.import_module(f"services.{role}.config")
    config_type: type[ServiceConfig] = getattr(module, f"{role.capitalize()}Config")
    shown = settings_help(role, config_type)
    for field in dataclasses.fields(config_type):
        assert f"HEDDLE_{role.upper()}_{field.name.upper()}  " in shown
    assert f"HEDDLE_{role.upper()}_HEARTBEAT_S  float, default 1.0\n    A peer is dead after three periods" in shown
    assert max(map(len, shown.splitlines())) <= 128


@pytest.mark.parametrize(
    ("argument", "status", "shown"),
    [
        ("--help", 0, "HEDDLE_PLANNER_DRAFT  str, default auto\n    auto: n-grams"),
        ("--draft", os.EX_USAGE, "heddle planner: unknown argument --draft; usage: python -m services.planner [--help]\n"),
    ],
)
async def test_a_service_answers_arguments_and_does_not_start(argument: str, status: int, shown: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.planner", argument),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, log = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == status
    assert shown in printed.decode() if status == 0 else shown == log.decode()
