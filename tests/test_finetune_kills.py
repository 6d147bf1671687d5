"""SIGKILL of trainer, executor or NATS server in the middle of a job: real processes, the same curve to the bit.

To the bit where sums have one order: a sequence per step, forward and backward in one piece. How a sequence is cut, and
which of a step's sequences go back together, depends on time; that changes last bits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import subjects
from common.artifacts import read_object
from common.bus import Bus, BusError
from common.codec import decode
from common.messages import AdapterRecord, FineTuningJob, StepDone
from common.nats_server import NatsServer
from tests.helpers import tiny_model
from tests.trainer_fakes import MODEL, example, write_model_dir
from tests.trainer_world import World

pytestmark = pytest.mark.timeout(240)

DATA = b"".join(example("answer " * (i % 5 + 1), question=str(i)) for i in range(4))
KILL_AT = 5
"""The step (from 0) whose end is the sign to kill: in the second of three epochs."""
SETTINGS = {
    "HEDDLE_EXECUTOR_IDLE_ITERATION_MS": "1000000",
    "HEDDLE_EXECUTOR_MAX_ITERATION_MS": "1000000",
    "HEDDLE_SERVED_MODEL_NAME": MODEL,
    "HEDDLE_HEARTBEAT_S": "0.2",
    "HEDDLE_EXECUTOR_DTYPE": "float32",
    "HEDDLE_EXECUTOR_THREADS": "1",
    "HEDDLE_EXECUTOR_KV_CACHE_TOKENS": "2048",
    "HEDDLE_TRAINER_LEASE_S": "1.5",
    "HEDDLE_TRAINER_RENEW_S": "0.3",
    "HEDDLE_TRAINER_CHECKPOINT_EVERY_S": "0.05",
    "HEDDLE_TRAINER_STALL_S": "3",
}


class Processes:
    """A NATS server, a trainer and an executor, each killed and started again at will."""

    def __init__(self, folder: Path) -> None:
        self.model_dir = write_model_dir(folder / "model")
        tiny_model(vocab_size=260, max_position_embeddings=512).save_pretrained(self.model_dir)
        self.server = NatsServer(folder / "nats")
        self._folder = folder
        self._running: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, role: str) -> None:
        """Start a service; it joins when it is ready."""
        environ = os.environ | SETTINGS | {"HEDDLE_NATS_URL": self.server.url, "HEDDLE_MODEL_DIR": str(self.model_dir)}
        with (self._folder / f"{role}.log").open("ab") as log:
            command = (sys.executable, "-m", f"services.{role}")
            self._running[role] = await asyncio.create_subprocess_exec(*command, env=environ, stdout=log, stderr=log)

    async def kill(self, role: str) -> None:
        """SIGKILL."""
        if role == "nats":
            self.server.kill()
            return
        process = self._running.pop(role)
        process.kill()
        await process.wait()

    async def restart(self, role: str) -> None:
        """Start what was killed."""
        if role == "nats":
            self.server.start()
        else:
            await self.start(role)

    async def end(self) -> None:
        """Kill all that runs."""
        for role in list(self._running):
            await self.kill(role)
        self.server.stop()


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    made = Processes(tmp_path)
    made.server.start()
    try:
        for role in ("executor", "trainer"):
            await made.start(role)
        yield made
    finally:
        await made.end()


async def create(world: World) -> FineTuningJob:
    """A job of three epochs of four steps, with dropout, as soon as there is a trainer and an executor."""
    hyperparameters = {"n_epochs": 3, "batch_size": 1}
    lora = {"rank": 4, "dropout": 0.2, "learning_rate": 0.01}
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(BusError, TimeoutError):
                return await world.create(hyperparameters=hyperparameters, lora=lora)
            await asyncio.sleep(0.1)


async def ended(world: World, job: FineTuningJob) -> FineTuningJob:
    """The job when it is over; what does not answer meanwhile is asked again."""
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(BusError, TimeoutError):
                seen: FineTuningJob = await world.ask("get", job.id)
                if seen.status in ("succeeded", "failed", "cancelled"):
                    return seen
            await asyncio.sleep(0.1)


async def outcome(world: World, job: FineTuningJob) -> tuple[list[tuple[int, float]], bytes]:
    """Steps and losses, and the adapter's bytes."""
    done = await ended(world, job)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model
    key = subjects.adapter_key(done.fine_tuned_model)
    record = decode((await (await world.bus.key_value(subjects.ADAPTERS_BUCKET)).get(key)).value or b"", AdapterRecord)
    store = await world.bus.object_store(subjects.ARTIFACTS_STORE)
    return await world.losses(job.id), await read_object(store, record.artifact, 10.0)


@pytest.mark.parametrize(
    "victim", ["executor", pytest.param("trainer", marks=pytest.mark.slow), pytest.param("nats", marks=pytest.mark.slow)]
)
async def test_a_killed_process_changes_no_bit_of_the_curve(processes: Processes, victim: str) -> None:
    bus = await Bus.connect(processes.server.url, "test")
    try:
        world = World(_no_more, bus, processes.model_dir)
        await world.upload(DATA)
        expected = await outcome(world, await create(world))
        assert [step for step, _ in expected[0]] == list(range(1, 13))
        reached = asyncio.Event()

        async def on_progress(progress: Any) -> None:
            if isinstance(progress, StepDone) and progress.step == KILL_AT:
                reached.set()

        job = await create(world)
        await bus.subscribe(subjects.job_progress(job.id), StepDone, on_progress)
        async with asyncio.timeout(60):
            await reached.wait()
        await processes.kill(victim)
        await processes.restart(victim)
        actual = await outcome(world, job)
        assert actual[0] == expected[0]
        assert actual[1] == expected[1]
        told = [event.message for event in (await world.ask("events", job.id, limit=100)).data]
        assert any("continues after step" in message for message in told), "the job was over before the kill"
    finally:
        await bus.client.close()


async def _no_more() -> Bus:
    raise AssertionError("the processes have connections of their own")
