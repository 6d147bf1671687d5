"""Streams while the NATS server is killed and starts again: what got lost is made good, also where no gap shows it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common.bus import Bus
from common.nats_server import NatsServer
from tests.fakes import MODEL, SAID, write_tiny_model
from tests.gateway_stage import Connect, Stage, staged

WAIT_S = 10
STALLS_ONCE: dict[str, Any] = {"stall_at": 3, "num_stalls": 1}
"""The chunks of the first attempt end there: its executor sent the others while the gateway was away."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


async def collect(stage: Stage, num_choices: int = 1) -> tuple[list[str], list[str | None]]:
    """Texts and finish reasons of a streamed completion, by choice."""
    stream = await stage.openai.completions.create(model=MODEL, prompt="one two", max_tokens=64, stream=True, n=num_choices)
    texts = [""] * num_choices
    reasons: list[str | None] = [None] * num_choices
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return texts, reasons


def restart(server: NatsServer) -> None:
    """Kill it and start it on the same port."""
    server.kill()
    server.start()


async def test_a_bus_tells_when_it_is_back(bus: Bus, nats_server: NatsServer) -> None:
    back = asyncio.Event()
    bus.on_reconnect.append(back.set)
    await bus.flush()
    assert not back.is_set()
    restart(nats_server)
    await asyncio.wait_for(back.wait(), WAIT_S)
    assert bus.client.is_connected


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_chunks_that_nobody_heard_are_made_again(
    connect: Connect, model_dir: Path, nats_server: NatsServer, num_choices: int
) -> None:
    async with staged(connect, model_dir, fake=STALLS_ONCE | {"num_stalls": num_choices}) as stage:
        collecting = asyncio.create_task(collect(stage, num_choices))
        while stage.executor.num_stalls > 0:
            stage.executor.stalled.clear()
            await asyncio.wait_for(stage.executor.stalled.wait(), WAIT_S)
        await stage.bus.flush()
        await stage.gateway.bus.flush()
        restart(nats_server)
        texts, reasons = await asyncio.wait_for(collecting, WAIT_S)
        assert (texts, reasons) == ([SAID] * num_choices, ["stop"] * num_choices)
        before, after = stage.executor.requests[:num_choices], stage.executor.requests[num_choices:]
        assert {request.num_generated for request in after} == {3}
        assert after[0].prompt_tokens == before[0].prompt_tokens + tuple(stage.executor.reply[:3])
        assert len({request.request_id for request in before + after}) == 2 * num_choices
        abandoned = {request.request_id for request in before}
        while abandoned:
            abandoned.discard(await asyncio.wait_for(stage.executor.cancelled.get(), WAIT_S))
        await asyncio.wait_for(stage.settled(), WAIT_S)


async def test_an_executor_may_have_begun_before_the_answer_of_admission_arrives(
    connect: Connect, model_dir: Path, nats_server: NatsServer
) -> None:
    async with staged(connect, model_dir, fake={"stall_at": 0, "num_stalls": 1}) as stage:
        stage.admission.hold = asyncio.Event()
        collecting = asyncio.create_task(collect(stage))
        await asyncio.wait_for(stage.admission.asked.wait(), WAIT_S)
        is_back = asyncio.Event()
        stage.gateway.bus.on_reconnect.append(is_back.set)
        restart(nats_server)
        await asyncio.wait_for(is_back.wait(), WAIT_S)
        stage.admission.hold.set()
        assert await asyncio.wait_for(collecting, WAIT_S) == ([SAID], ["stop"])
        assert len(stage.executor.requests) == 2


async def test_a_stream_that_was_complete_before_is_not_repeated(
    connect: Connect, model_dir: Path, nats_server: NatsServer
) -> None:
    async with staged(connect, model_dir) as stage:
        assert await asyncio.wait_for(collect(stage), WAIT_S) == ([SAID], ["stop"])
        is_back = asyncio.Event()
        stage.gateway.bus.on_reconnect.append(is_back.set)
        restart(nats_server)
        await asyncio.wait_for(is_back.wait(), WAIT_S)
        assert await asyncio.wait_for(collect(stage), WAIT_S) == ([SAID], ["stop"])
        assert "migrated_requests" not in stage.gateway.actor.vitals().counters
