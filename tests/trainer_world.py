"""Trainers, fake executors and a client on one server: what the trainer's tests play with."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from nats.js.errors import NotFoundError

from common import subjects
from common.bus import Bus, RemoteError
from common.chat import ChatTokenizer
from common.codec import decode
from common.files import file_meta
from common.messages import CheckpointPage, CreateJob, EventPage, FineTuningJob, JobPage, JobQuery
from services.trainer.actor import TrainerActor
from services.trainer.config import TrainerConfig
from services.trainer.dataset import read_dataset
from services.trainer.drive import Course
from services.trainer.jobs import JobRecord
from services.trainer.spec import JobSpec
from tests.trainer_fakes import MODEL, FakeExecutor, trained


async def eventually(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something that has no event of its own, such as another party's state."""
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class RunningTrainer:
    """A trainer's actor on its own connection; `stop` drains it, `vanish` is its sudden death."""

    def __init__(self, bus: Bus, config: TrainerConfig) -> None:
        self.bus, self.config = bus, config
        self.actor = TrainerActor(config)
        self._stop = asyncio.Event()
        self._started = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> RunningTrainer:
        self._task = asyncio.create_task(self._main())
        await asyncio.wait_for(self._started.wait(), 5)
        await self.bus.flush()
        return self

    async def _main(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as tasks:
                await self.actor.start(self.bus, tasks)
                self._started.set()
                await self._stop.wait()
                await self.actor.drain()
                tasks.create_task(_cancel(asyncio.current_task()))

    async def idle(self) -> None:
        """Wait until it runs nothing."""
        await eventually(lambda: not any(self.actor.vitals().gauges.values()))

    async def stop(self) -> None:
        self._stop.set()
        assert self._task is not None
        await asyncio.wait_for(self._task, 10)

    @contextlib.asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """Hold back all it sends, as when the process is stopped; it reads and thinks on."""
        send, gate = self.bus.client.publish, asyncio.Event()

        async def later(*args: Any, **kwargs: Any) -> None:
            await gate.wait()
            await send(*args, **kwargs)

        self.bus.client.publish = later  # type: ignore[method-assign]
        yield
        self.bus.client.publish = send  # type: ignore[method-assign]
        gate.set()

    async def vanish(self) -> None:
        """As by SIGKILL: nothing is handed over, and the connection is gone."""
        if self.bus.client.is_closed:
            return
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        with contextlib.suppress(TimeoutError):  # a transfer was cut off
            async with asyncio.timeout(0.5):
                await self.bus.client.drain()  # else the server would go on sending it requests for a moment
        await self.bus.client.close()


async def _cancel(task: asyncio.Task[Any] | None) -> None:
    assert task is not None
    task.cancel()


class World:
    """Trainers, executors and a client on one server, with short periods."""

    def __init__(self, connect: Callable[[], Awaitable[Bus]], bus: Bus, model_dir: Path) -> None:
        self.bus = bus
        self.trainers: list[RunningTrainer] = []
        self.executors: list[FakeExecutor] = []
        self._connect, self._model_dir = connect, model_dir

    async def trainer(self, name: str = "t", **changes: Any) -> RunningTrainer:
        """Start a trainer on a connection of its own."""
        settings: dict[str, Any] = {
            "heartbeat_s": 0.05, "lease_s": 1.0, "renew_s": 0.1, "request_timeout_s": 0.5, "open_timeout_s": 5.0,
        } | changes  # fmt: skip
        config = TrainerConfig(instance_id=name, model_dir=self._model_dir, **settings)
        self.trainers.append(await RunningTrainer(await self._connect(), config).start())
        return self.trainers[-1]

    async def executor(
        self, name: str = "x", permits: int | None = None, *, slow_start: bool = False, max_training_tokens: int = 0
    ) -> FakeExecutor:
        """Start an executor on a connection of its own; as processes do, with `slow_start` it says so first."""
        made = FakeExecutor(await self._connect(), name, permits)
        made.slow_start, made.max_training_tokens = slow_start, max_training_tokens
        self.executors.append(await made.start())
        return made

    async def upload(self, data: bytes, name: str = "file-1", purpose: str = "fine-tune") -> None:
        """Store a training file, as the gateway does."""
        store = await self.bus.object_store(subjects.FILES_STORE)
        await store.put(name, data, file_meta(name, f"{name}.jsonl", purpose, 1.0))

    async def create(self, **changes: Any) -> FineTuningJob:
        """Create a job, as soon as an executor is known: 2 epochs, batches of 2."""
        body = {"model": MODEL, "training_file": "file-1", "seed": 3, "hyperparameters": {"n_epochs": 2, "batch_size": 2}}
        async with asyncio.timeout(10):
            while True:
                try:
                    message = CreateJob(body=body | changes)
                    return await self.bus.request(subjects.finetune("create"), message, FineTuningJob)
                except RemoteError as error:
                    if error.reply.status != 503:
                        raise
                await asyncio.sleep(0.02)

    async def ask(self, verb: str, job_id: str = "", after: str = "", limit: int = 20) -> Any:
        """One call of the API."""
        kinds: dict[str, Any] = {"list": JobPage, "events": EventPage, "checkpoints": CheckpointPage}
        query = JobQuery(job_id=job_id, after=after, limit=limit)
        return await self.bus.request(subjects.finetune(verb), query, kinds.get(verb, FineTuningJob))

    async def until(self, job_id: str, is_so: Callable[[JobRecord], bool], timeout_s: float = 20.0) -> JobRecord:
        """The first record of the job, from now on, of which this holds."""
        watcher = await (await self.bus.key_value(subjects.JOBS_BUCKET)).watch(job_id)
        last: JobRecord | None = None
        try:
            async with asyncio.timeout(timeout_s):
                async for entry in watcher:
                    if entry is not None and entry.value:
                        last = decode(entry.value, JobRecord)
                        if is_so(last):
                            return last
        except TimeoutError:
            messages = [event.message for event in (await self.ask("events", job_id)).data]
            raise AssertionError(f"waited for another state than {last}; events {messages}") from None
        finally:
            await watcher.stop()  # type: ignore[no-untyped-call]
        raise AssertionError("the watch ended")

    async def until_status(self, job_id: str, status: str) -> FineTuningJob:
        """The job when it has this status."""
        return (await self.until(job_id, lambda record: record.job.status == status)).job

    async def losses(self, job_id: str) -> list[tuple[int, float]]:
        """Step and loss of all metrics events, oldest first."""
        page = await self.ask("events", job_id, limit=100)
        return [(e.data["step"], e.data["train_loss"]) for e in reversed(page.data) if e.type == "metrics"]

    async def artifact(self, name: str) -> dict[str, Any]:
        """What an executor stored: step and state."""
        stored: dict[str, Any] = json.loads(
            (await (await self.bus.object_store(subjects.ARTIFACTS_STORE)).get(name)).data or b""
        )
        return stored

    async def stored(self) -> set[str]:
        """Names of all artifacts."""
        try:
            infos = await (await self.bus.object_store(subjects.ARTIFACTS_STORE)).list(ignore_deletes=True)
        except NotFoundError:
            return set()
        return {info.name or "" for info in infos}

    async def end(self) -> None:
        """Stop all that still runs."""
        for trainer in self.trainers:
            await trainer.vanish()
        for executor in self.executors:
            await executor.die()


def expected_state(tokenizer: ChatTokenizer, data: bytes, spec: JobSpec) -> str:
    """The state of an executor that did all steps of the job exactly once, in order."""
    course = Course.of("any", spec, read_dataset(data, tokenizer, 2048))
    state = b""
    for step in range(course.plan.total_steps):
        state = trained(state, course.slices(step, lease=0))
    return state.hex()
