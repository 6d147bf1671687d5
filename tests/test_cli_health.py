"""`heddle health` against services on a real NATS server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from nats import micro

from common import subjects
from common.bus import Bus
from common.messages import Beat, ServiceState
from common.nats_server import NatsServer
from services.cli.health import HealthError, check
from services.cli.nats_once import NatsUnreachableError

HERE = socket.gethostname()
LONG_S = 30.0
"""More than any machine takes."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings are waited for: how fast they are answered is the machine's business."""
    monkeypatch.setattr("services.cli.health.PING_WAIT_S", LONG_S)


@asynccontextmanager
async def executor(bus: Bus, instance_id: str, state: ServiceState, host: str = HERE) -> AsyncIterator[None]:
    """An executor that answers pings and beats often."""
    metadata = {"instance_id": instance_id, "host": host}
    service = await micro.add_service(bus.client, name="heddle-executor", version="0.1.0", metadata=metadata)
    beat = Beat(role="executor", instance_id=instance_id, state=state, sent_at=0.0, period_s=0.01)

    async def beat_for_ever() -> None:
        while True:
            await bus.publish(subjects.beat("executor", instance_id), beat)
            await asyncio.sleep(0.01)

    beating = asyncio.create_task(beat_for_ever())
    yield
    beating.cancel()
    await service.stop()


async def test_a_ready_instance_of_this_host_is_healthy(bus: Bus, nats_server: NatsServer) -> None:
    async with executor(bus, "a", "ready"):
        assert await check("executor", nats_server.url, timeout_s=LONG_S) == "a"


@pytest.mark.parametrize("state", ["starting", "draining"])
async def test_an_instance_that_answers_but_is_not_ready_is_not_healthy(
    bus: Bus, nats_server: NatsServer, state: ServiceState
) -> None:
    async with executor(bus, "a", state):
        with pytest.raises(HealthError, match="said within"):
            await check("executor", nats_server.url, timeout_s=0.1)


async def test_instances_of_other_hosts_count_only_when_asked_for(
    bus: Bus, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with executor(bus, "far", "ready", host="elsewhere"):
        assert await check("executor", nats_server.url, "any", LONG_S) == "far"
        monkeypatch.setattr("services.cli.health.PING_WAIT_S", 0.1)
        with pytest.raises(HealthError, match="no executor answers pings"):
            await check("executor", nats_server.url)


async def test_the_state_of_another_host_s_instance_does_not_count(bus: Bus, nats_server: NatsServer) -> None:
    async with executor(bus, "far", "ready", host="elsewhere"), executor(bus, "near", "starting"):
        with pytest.raises(HealthError, match="said within"):
            await check("executor", nats_server.url, timeout_s=0.1)


async def test_without_a_service_the_answer_is_quick(nats_server: NatsServer) -> None:
    with pytest.raises(HealthError, match="no planner answers pings"):
        await asyncio.wait_for(check("planner", nats_server.url), LONG_S / 2)


async def test_without_a_server_there_is_a_reason(nats_server: NatsServer) -> None:
    nats_server.stop()
    with pytest.raises(NatsUnreachableError, match="Connect call failed"):
        await check("planner", nats_server.url)


async def test_a_malformed_beat_is_passed_over(bus: Bus, nats_server: NatsServer) -> None:
    async with executor(bus, "a", "ready"):
        checking = asyncio.create_task(check("executor", nats_server.url, timeout_s=LONG_S))
        while not checking.done():
            await bus.publish_raw(subjects.beat("executor", "a"), b"garbage")
            await asyncio.sleep(0.001)
        assert checking.result() == "a"
