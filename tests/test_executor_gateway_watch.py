"""Gateways that die: their requests end on the executor, nobody else's do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common import subjects
from common.messages import Admitted, Beat, ServiceState
from services.executor.gateway_watch import CHECK_PERIOD_S, GatewayWatch
from tests.executor_stage import Connect, Gate, Stage, known_profile, running_executor, write_model
from tests.tiny import NUM_TOKENS, PROMPTS, tiny_request, truth

NEVER_S = 1e6


def beat(gateway_id: str, state: ServiceState = "ready", period_s: float = 1.0) -> Beat:
    return Beat(role="gateway", instance_id=gateway_id, state=state, sent_at=0.0, period_s=period_s)


def watch_of(lost: list[str]) -> GatewayWatch:
    return GatewayWatch(1.0, lost.append)


def test_only_silent_gateways_are_lost_and_only_once() -> None:
    lost: list[str] = []
    watch = watch_of(lost)
    for gateway_id, at in (("silent", 0.0), ("never heard", 0.0), ("slow", 0.0), ("alive", 0.0), ("busy", 0.0), ("busy", 9.0)):
        watch.expect(gateway_id, at)
    watch.observe(beat("silent"), 6.5)
    watch.observe(beat("alive"), 8.0)
    watch.observe(beat("slow", period_s=4.0), 0.5)
    for now in (3.0, 9.4):
        watch.look(now, is_connected=True, since_last_s=CHECK_PERIOD_S)
        assert lost == ([] if now == 3.0 else ["never heard"])
    for now in (10.0, 10.1):
        watch.look(now, is_connected=True, since_last_s=CHECK_PERIOD_S)
        assert lost == ["never heard", "silent"]
    watch.expect("silent", 20.0)
    watch.look(22.9, is_connected=True, since_last_s=CHECK_PERIOD_S)
    assert "silent" not in lost[2:], "it asked again, so it lives"


@pytest.mark.parametrize(("is_connected", "since_last_s"), [(False, CHECK_PERIOD_S), (True, 60.0)])
def test_an_executor_that_heard_nobody_blames_nobody(is_connected: bool, since_last_s: float) -> None:
    lost: list[str] = []
    watch = watch_of(lost)
    watch.expect("a", 0.0)
    watch.look(100.0, is_connected=is_connected, since_last_s=since_last_s)
    watch.look(102.0, is_connected=True, since_last_s=CHECK_PERIOD_S)
    assert lost == []
    watch.look(103.5, is_connected=True, since_last_s=CHECK_PERIOD_S)
    assert lost == ["a"]


def test_a_gateway_that_is_born_again_has_forgotten_its_requests() -> None:
    lost: list[str] = []
    watch = watch_of(lost)
    watch.observe(beat("a", "starting"), 0.0)
    watch.expect("a", 0.5)
    watch.observe(beat("a", "starting"), 1.0)
    assert lost == [], "a request of this life"
    watch.observe(beat("a"), 2.0)
    watch.observe(beat("a", "draining"), 2.5)
    watch.observe(beat("a", "starting"), 3.0)
    watch.observe(beat("a", "starting"), 4.0)
    assert lost == ["a"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


async def tell(stage: Stage, gateway_beat: Beat) -> None:
    """A beat on the bus; returns when the executor's connection has it."""
    await stage.client.publish(subjects.beat("gateway", gateway_beat.instance_id), gateway_beat)
    await stage.client.flush()
    await stage.bus.flush()


async def admit(stage: Stage, name: str, **fields: Any) -> None:
    assert isinstance(await stage.admit(tiny_request(name, PROMPTS["r3"], NUM_TOKENS, **fields)), Admitted)


async def test_requests_of_a_dead_gateway_end(connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fell silent, one that never beat; that of a living one and one without a gateway go on."""
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir, heartbeat_s=NEVER_S) as stage:
        gate = Gate(stage.engine)
        await tell(stage, beat("living", period_s=NEVER_S))
        owners = {"a": "dead", "b": "unheard", "c": "living", "d": ""}
        admitting = [asyncio.create_task(admit(stage, name, gateway_id=owner)) for name, owner in owners.items()]
        await stage.poll(lambda: len(stage.engine.sequences) + len(stage.inbox._changes) == len(owners))
        gate.let()
        await asyncio.gather(*admitting)
        await tell(stage, beat("dead", period_s=0.05))
        stage.actor._gateways._heard["unheard"].period_s = 0.05  # from now on: all are admitted
        await stage.poll(lambda: not {"dead", "unheard"} & stage.actor._gateways._heard.keys())
        gate.open()
        for name in ("a", "b"):
            end = await stage.end(name)
            assert end.finish_reason == "cancelled"
            assert end.error == "nothing was heard of the request's gateway"
        for name in ("c", "d"):
            assert await stage.output(name) == truth()["r3"]
        await stage.settled()
        assert stage.counters()["orphaned_requests"] == 2
        assert stage.load.free_pages == stage.load.num_pages


async def test_requests_of_a_gateway_that_starts_again_end(
    connect: Connect, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_profile(monkeypatch)
    async with running_executor(connect, model_dir) as stage:
        gate = Gate(stage.engine)
        await tell(stage, beat("gateway", period_s=NEVER_S))
        await admit(stage, "before", gateway_id="gateway")
        await stage.poll(lambda: gate.num_started == 1)
        await tell(stage, beat("gateway", "starting", period_s=NEVER_S))
        await stage.poll(lambda: stage.inbox._changes)
        gate.open()
        assert (await stage.end("before")).finish_reason == "cancelled"
        await admit(stage, "after", gateway_id="gateway")
        await tell(stage, beat("gateway", "starting", period_s=NEVER_S))
        assert await stage.output("after") == truth()["r3"]
