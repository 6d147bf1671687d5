"""A gateway in the test's own process with a fake executor behind it, and real clients in front."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from common.bus import Bus
from common.chat import ChatTokenizer
from services.gateway.actor import GatewayActor
from services.gateway.config import GatewayConfig
from tests.fakes import BEAT_S, MODEL, REPLY, FakeAdmission, FakeExecutor

Connect = Callable[[], Awaitable[Bus]]


@dataclass
class RunningGateway:
    """A gateway in this process."""

    actor: GatewayActor
    bus: Bus
    url: str


@contextlib.asynccontextmanager
async def running_gateway(bus: Bus, model_dir: Path, **settings: Any) -> AsyncIterator[RunningGateway]:
    """A gateway on a free port, drained at the end. Its heart beats fast, so that death is noticed fast."""
    defaults: dict[str, Any] = {
        "model_dir": str(model_dir),
        "served_model_name": MODEL,
        "port": 0,
        "nats_url": "nats://me:secret@nats:4222",
        "heartbeat_s": BEAT_S,
        "drain_grace_s": 0.0,
        "open_wait_s": 0.0,
        "migration_wait_s": 5.0,
    }
    config = GatewayConfig(**defaults | settings)
    actor = GatewayActor(config)
    stop = asyncio.Event()
    ready = asyncio.Event()

    async def live() -> None:
        async with asyncio.TaskGroup() as tasks:
            await actor.start(bus, tasks)
            ready.set()
            await stop.wait()
            await actor.drain()
            raise _Stop

    task = asyncio.create_task(live())
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        await task
    try:
        yield RunningGateway(actor, bus, actor.url)
    finally:
        stop.set()
        with contextlib.suppress(BaseExceptionGroup):
            await task


class _Stop(Exception):
    """Ends the gateway's tasks."""


@dataclass(kw_only=True)
class Stage:
    """A gateway with one executor behind it, and clients of it."""

    bus: Bus
    tokenizer: ChatTokenizer
    executor: FakeExecutor
    admission: FakeAdmission
    gateway: RunningGateway
    openai: AsyncOpenAI
    http: httpx.AsyncClient

    async def second_executor(self) -> FakeExecutor:
        """One more executor that says the same, known to the gateway."""
        executor = FakeExecutor(self.bus, self.executor.reply, executor_id="executor-2")
        executor.chunk_size = self.executor.chunk_size
        self.admission.executors.append(await executor.start())
        await self.sees(sum(not each.is_dead for each in self.admission.executors))
        return executor

    async def settled(self) -> None:
        """Wait until the gateway has no live stream."""
        await self.gateway.actor._watch.wait_idle()

    async def sees(self, num_executors: int) -> None:
        """Wait until the gateway knows so many living executors."""
        await self.until(
            "/status", lambda status: sum(service["name"] == "executor" for service in status["services"]) == num_executors
        )

    async def until(self, path: str, holds: Callable[[Any], bool]) -> None:
        """Wait until the gateway's answer is as expected."""
        await until(self.http, path, holds)


async def until(http: httpx.AsyncClient, path: str, holds: Callable[[Any], bool]) -> None:
    """Ask again and again until the answer is as expected."""
    async with asyncio.timeout(10):
        while True:
            if holds((await http.get(path)).json()):
                return
            await asyncio.sleep(BEAT_S / 5)


@contextlib.asynccontextmanager
async def staged(
    connect: Connect, model_dir: Path, reply: str = REPLY, *, fake: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Stage]:
    """A stage whose executor says `reply`; `fake` are the executor's fields, `settings` the gateway's."""
    bus = await connect()
    tokenizer = ChatTokenizer.load(model_dir)
    executor = await FakeExecutor(bus, tokenizer.encode(reply), **fake or {}).start()
    admission = await FakeAdmission(bus, executor).start()
    async with running_gateway(await connect(), model_dir, **settings) as gateway:
        key = settings.get("api_key", "none")
        openai = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=20)
        headers = {"authorization": f"Bearer {key}"}
        async with openai, httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=20) as http:
            stage = Stage(
                bus=bus,
                tokenizer=tokenizer,
                executor=executor,
                admission=admission,
                gateway=gateway,
                openai=openai,
                http=http,
            )
            await stage.sees(1)
            yield stage
    await admission.stop()
    for each in admission.executors:
        await each.kill()
