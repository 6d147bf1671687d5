"""An executor in the test's own process on a real bus, with a client in front; knows no test's purpose."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from common import subjects
from common.bus import Bus
from common.messages import (
    Admit,
    Admitted,
    Cancel,
    CheckpointWritten,
    ExecutorLoad,
    InferenceRequest,
    JobClosed,
    JobFailed,
    JobOpened,
    LoraSpec,
    OpenJob,
    Rejected,
    SequenceEvaluated,
    SliceAccepted,
    StepDone,
    TokenChunk,
)
from common.service import _Workers
from services.executor import startup
from services.executor.actor import ExecutorActor
from services.executor.config import ExecutorConfig
from services.executor.engine import Engine, Iteration
from services.executor.inbox import Inbox
from tests.tiny import PROFILE, Streams, tiny_pair

Connect = Callable[[], Awaitable[Bus]]
T = TypeVar("T")
MODEL = "tiny"
TIMEOUT_S = 15.0
EITHER: Any = Admitted | Rejected


class Mailbox(list[T]):
    """A list that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = asyncio.Condition()

    async def put(self, item: T) -> None:
        """Append and wake those who wait."""
        async with self._grown:
            self.append(item)
            self._grown.notify_all()

    async def first(self, wanted: Callable[[T], bool]) -> T:
        """The first item that is wanted, waiting for it."""
        async with asyncio.timeout(TIMEOUT_S), self._grown:
            while True:
                for item in self:
                    if wanted(item):
                        return item
                await self._grown.wait()

    async def hold(self, num_items: int) -> list[T]:
        """Its items once there are so many."""
        async with asyncio.timeout(TIMEOUT_S), self._grown:
            await self._grown.wait_for(lambda: len(self) >= num_items)
        return list(self)


class Gate:
    """Passes of an engine that wait for a permit on the device's thread; open() lets all through."""

    def __init__(self, engine: Engine) -> None:
        self._pass = engine.forward_pass
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self.num_started = 0
        cast(Any, engine).forward_pass = self._forward_pass

    def let(self, num_passes: int = 1) -> None:
        """Let so many passes through."""
        self._permits.release(num_passes)

    def open(self) -> None:
        """Let everything through from now on."""
        self._is_open = True
        self._permits.release()

    def _forward_pass(self) -> Iteration:
        self.num_started += 1
        if not self._is_open:
            assert self._permits.acquire(timeout=TIMEOUT_S)
        return self._pass()


@dataclass(kw_only=True)
class Stage:
    """A running executor and a client's connection."""

    actor: ExecutorActor
    bus: Bus
    """The executor's own."""
    client: Bus
    executor_id: str
    ended: asyncio.Task[None]
    chunks: Mailbox[TokenChunk] = field(default_factory=Mailbox)
    progress: Mailbox[StepDone | SequenceEvaluated | JobFailed] = field(default_factory=Mailbox)

    @property
    def engine(self) -> Engine:
        """What the actor drives."""
        return self.actor._engine

    @property
    def inbox(self) -> Inbox:
        """What waits for the current pass to end."""
        return self.actor._inbox

    @property
    def load(self) -> ExecutorLoad:
        """What the next heartbeat says of the load."""
        load = self.actor.vitals().executor
        assert load is not None
        return load

    async def admit(self, request: InferenceRequest) -> Admitted | Rejected:
        """Hand over a request as admission does."""
        answer: Admitted | Rejected = await self.client.request(
            subjects.executor_admit(self.executor_id), Admit(request=request), EITHER, TIMEOUT_S
        )
        return answer

    async def cancel(self, request_id: str) -> None:
        """Cancel a request as a gateway does; returns when the executor knows."""
        self.inbox._filled.clear()
        await self.client.publish(subjects.cancel(request_id), Cancel(request_id=request_id))
        await asyncio.wait_for(self.inbox._filled.wait(), TIMEOUT_S)

    async def order(self, order: Any) -> Any:
        """Send an order as a trainer does; returns whatever message the answer is."""
        any_reply: Any = JobOpened | SliceAccepted | CheckpointWritten | JobClosed | Rejected
        return await self.client.request(subjects.executor_slices(self.executor_id), order, any_reply, TIMEOUT_S)

    async def output(self, request_id: str) -> list[int]:
        """The tokens of a request after its end; its stream, like all others so far, kept the contract."""
        await self.end(request_id)
        streams = Streams()
        streams.take(self.chunks)
        return streams.tokens[request_id]

    async def end(self, request_id: str) -> TokenChunk:
        """The last chunk of a request."""
        return await self.chunks.first(lambda chunk: chunk.request_id == request_id and chunk.finish_reason is not None)

    async def tokens_of(self, request_id: str, num_chunks: int) -> None:
        """Returns when so many chunks of a request are here."""
        await self.chunks.first(lambda chunk: chunk.request_id == request_id and chunk.seq >= num_chunks - 1)

    async def settled(self) -> None:
        """Returns when the executor is idle and its vitals say so."""
        async with asyncio.timeout(TIMEOUT_S):
            while await self.inbox.ask(lambda: self.engine.has_work):
                pass
            await self.inbox.ask(lambda: None)

    async def poll(self, check: Callable[[], object], act: Callable[[], Awaitable[None]] | None = None) -> None:
        """Returns when the check holds; acts until then."""
        async with asyncio.timeout(TIMEOUT_S):
            while not check():
                if act is not None:
                    await act()
                await asyncio.sleep(0.005)

    def counters(self) -> dict[str, float]:
        """Counters of the next heartbeat that are not zero."""
        found: dict[str, float] = defaultdict(float)
        return found | {name: count for name, count in self.actor.vitals().counters.items() if count}


def write_model(folder: Path) -> Path:
    """The tiny random model as a Hugging Face folder."""
    tiny_pair()[0].save_pretrained(folder / MODEL)
    return folder / MODEL


@contextlib.asynccontextmanager
async def running_executor(connect: Connect, model_dir: Path, **settings: Any) -> AsyncIterator[Stage]:
    """An executor with a small pool and a given latency profile, ready for work."""
    defaults: dict[str, Any] = {
        "model_dir": str(model_dir),
        "instance_id": "executor-1",
        "dtype": "float32",
        "threads": 1,
        "page_size": 4,
        "kv_cache_tokens": 512,
        "log_iterations": False,
        "drain_grace_s": TIMEOUT_S,
    }
    config = ExecutorConfig(**defaults | settings)
    bus, client = await connect(), await connect()
    actor, ready, stop = ExecutorActor(config), asyncio.Event(), asyncio.Event()

    async def live() -> None:
        async with _Workers() as tasks:
            await actor.start(bus, tasks)
            ready.set()
            await stop.wait()
            await tasks.cancel_all()

    ended = asyncio.create_task(live())
    stage = Stage(actor=actor, bus=bus, client=client, executor_id=config.instance_id, ended=ended)
    await client.subscribe(subjects.stream("*"), TokenChunk, stage.chunks.put)
    reports: Any = StepDone | SequenceEvaluated | JobFailed
    await client.subscribe(subjects.ALL_PROGRESS, reports, stage.progress.put)
    await client.flush()
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait((ended, waiting), timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if ended.done():
            await ended
        assert ready.is_set()
        await bus.flush()
        yield stage
    finally:
        stop.set()
        await asyncio.wait((ended,), timeout=TIMEOUT_S)
        actor._thread.shutdown()


def known_profile(monkeypatch: Any) -> None:
    """Executors that start do not measure their latency."""
    monkeypatch.setattr(startup, "measure_profile", lambda *_: PROFILE)


def open_job(**fields: Any) -> OpenJob:
    """A trainer's order with a small adapter."""
    values: dict[str, Any] = {"job_id": "job", "lease": 1, "base_model": MODEL, "lora": LoraSpec(rank=2, alpha=4.0)} | fields
    return OpenJob(**values)
