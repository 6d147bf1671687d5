"""SIGKILL of trainer, executor or NATS server in the middle of a job: real processes, the same curve to the bit.

Steps of several sequences, in iterations so short that time cuts these in pieces: tests/test_finetune_bitwise.py has the proof
that this changes no bit, here it is one of the things that differ between two runs.
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

DATA = b"".join(example("answer " * (5 * i % 7 + 1), question=str(i)) for i in range(7))
NUM_STEPS = 9
KILL_AT = 4
"""The step (from 0) whose end is the sign to kill: in the second of three epochs."""
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
SETTINGS = {
    "HEDDLE_EXECUTOR_IDLE_ITERATION_MS": "5",
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


undisturbed: list[tuple[list[tuple[int, float]], bytes]] = []
"""The outcome of the job that nothing disturbed: of other processes than most of those that it is compared with."""


class Processes:
    """A NATS server, a trainer and an executor, each killed and started again at will."""

    def __init__(self, folder: Path) -> None:
        self.model_dir = write_model_dir(folder / "model")
        tiny_model(vocab_size=260, max_position_embeddings=512, **SHAPE).save_pretrained(self.model_dir)
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


WITH_DROPOUT = {"rank": 4, "dropout": 0.2, "learning_rate": 0.01}


async def create(world: World, lora: dict[str, Any] = WITH_DROPOUT) -> FineTuningJob:
    """A job of three epochs of three steps, as soon as there is a trainer and an executor."""
    hyperparameters = {"n_epochs": 3, "batch_size": 3}
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


@pytest.mark.parametrize("victim", ["executor", *(pytest.param(role, marks=pytest.mark.slow) for role in ("trainer", "nats"))])
async def test_a_killed_process_changes_no_bit_of_the_curve(processes: Processes, victim: str) -> None:
    bus = await Bus.connect(processes.server.url, "test")
    try:
        world = World(no_more, bus, processes.model_dir)
        await world.upload(DATA)
        if not undisturbed:
            undisturbed.append(await outcome(world, await create(world)))
            assert [step for step, _ in undisturbed[0][0]] == list(range(1, NUM_STEPS + 1))
        reached = asyncio.Event()

        async def on_progress(progress: Any) -> None:
            if isinstance(progress, StepDone) and progress.step == KILL_AT:
                reached.set()

        job = await create(world)
        await bus.subscribe(subjects.job_progress(job.id), StepDone, on_progress)
        async with asyncio.timeout(60):
            await reached.wait()
        assert (await world.ask("get", job.id)).status == "running", "the job was over before the kill"
        await processes.kill(victim)
        await processes.restart(victim)
        actual = await outcome(world, job)
        assert actual == undisturbed[0]
        told = [event.message for event in (await world.ask("events", job.id, limit=100)).data]
        if victim != "nats":  # without it for a moment, trainer and executor may go on where they were
            assert any("continues after step" in message for message in told)
    finally:
        await bus.client.close()


async def no_more() -> Bus:
    """What a World of processes may ask for."""
    raise AssertionError("the processes have connections of their own")
