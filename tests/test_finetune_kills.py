"""SIGKILL of trainer, executor or NATS server in the middle of a job: real processes, the same curve to the bit.

Steps of several sequences, in iterations so short that time cuts these in pieces: tests/test_finetune_bitwise.py has the proof
that this changes no bit, here it is one of the things that differ between two runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from common import subjects
from common.artifacts import read_object
from common.bus import Bus, BusError
from common.chat import ChatTokenizer
from common.codec import decode
from common.fingerprint import fingerprint
from common.messages import AdapterRecord, FineTuningJob, StepDone
from common.nats_server import NatsServer
from services.planner.config import PlannerConfig
from services.planner.drafter import DraftOrder, FeatureNeed
from services.planner.drafters import make_drafter
from services.planner.features import FeaturesDrafter
from services.planner.features_head import FeaturesHead
from services.trainer.dataset import read_dataset
from tests.helpers import tiny_model
from tests.trainer_fakes import MODEL, example, write_model_dir
from tests.trainer_world import World

pytestmark = pytest.mark.timeout(240)

DATA = b"".join(example("answer " * (5 * i % 7 + 1), question=str(i)) for i in range(7))
HELD_OUT = b"".join(example(f"answer {i} " * 4) for i in range(2))
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


Outcome = tuple[list[tuple[int, float]], bytes]
"""Steps and losses, and what was trained."""
undisturbed: dict[str, Outcome] = {}
"""The outcome of the job that nothing disturbed, by method: of other processes than most of those that it is compared with."""


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


EPOCHS = {"n_epochs": 3, "batch_size": 3}
LEARNED = {**EPOCHS, "learning_rate": 0.01, "vocabulary_size": 200}
WITH_DROPOUT = {"rank": 4, "dropout": 0.2, "learning_rate": 0.01}
JOBS: dict[str, dict[str, Any]] = {
    "supervised": {"hyperparameters": EPOCHS, "lora": WITH_DROPOUT},
    "distillation": {
        "hyperparameters": None,
        "validation_file": "file-2",
        "method": {"type": "distillation", "distillation": {"hyperparameters": LEARNED}},
    },
}


async def create(world: World, fields: dict[str, Any]) -> FineTuningJob:
    """A job of three epochs of three steps, as soon as there is a trainer and an executor."""
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(BusError, TimeoutError):
                return await world.create(**fields)
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


async def outcome(world: World, job: FineTuningJob) -> Outcome:
    """Steps and losses, and the bytes of the adapter or the drafter."""
    done = await ended(world, job)
    assert done.status == "succeeded", done.error
    if done.method == "distillation":
        return await world.losses(job.id), (await drafter_of(world, done))["drafter.safetensors"]
    assert done.fine_tuned_model
    key = subjects.adapter_key(done.fine_tuned_model)
    record = decode((await (await world.bus.key_value(subjects.ADAPTERS_BUCKET)).get(key)).value or b"", AdapterRecord)
    store = await world.bus.object_store(subjects.ARTIFACTS_STORE)
    return await world.losses(job.id), await read_object(store, record.artifact, 10.0)


async def drafter_of(world: World, job: FineTuningJob) -> dict[str, bytes]:
    """The files that the job left, by name."""
    store, files = await world.bus.object_store(subjects.FILES_STORE), dict[str, bytes]()
    for file_id in job.result_files:
        record = json.loads((await store.get_info(file_id)).description or "")
        files[record["filename"]] = await read_object(store, file_id, 10.0)
    return files


async def disturbed(world: World, processes: Processes, victim: str, method: str) -> FineTuningJob:
    """A job during which a process was killed, and whose outcome is that of one that was left in peace."""
    if method not in undisturbed:
        undisturbed[method] = await outcome(world, await create(world, JOBS[method]))
        assert [step for step, _ in undisturbed[method][0]] == list(range(1, NUM_STEPS + 1))
    reached = asyncio.Event()

    async def on_progress(progress: Any) -> None:
        if isinstance(progress, StepDone) and progress.step == KILL_AT:
            reached.set()

    job = await create(world, JOBS[method])
    await world.bus.subscribe(subjects.job_progress(job.id), StepDone, on_progress)
    async with asyncio.timeout(60):
        await reached.wait()
    assert (await world.ask("get", job.id)).status == "running", "the job was over before the kill"
    await processes.kill(victim)
    await processes.restart(victim)
    assert await outcome(world, job) == undisturbed[method]
    told = [event.message for event in (await world.ask("events", job.id, limit=100)).data]
    if victim != "nats":  # without it for a moment, trainer and executor may go on where they were
        assert any("continues after step" in message for message in told)
    return await ended(world, job)


@pytest.mark.parametrize("victim", ["executor", *(pytest.param(role, marks=pytest.mark.slow) for role in ("trainer", "nats"))])
async def test_a_killed_process_changes_no_bit_of_the_curve(processes: Processes, victim: str) -> None:
    bus = await Bus.connect(processes.server.url, "test")
    try:
        world = World(no_more, bus, processes.model_dir)
        await world.upload(DATA)
        await disturbed(world, processes, victim, "supervised")
    finally:
        await bus.client.close()


async def test_a_killed_executor_changes_no_bit_of_a_drafter_that_a_planner_then_drafts_with(
    processes: Processes, tmp_path: Path
) -> None:
    folder = tmp_path / "drafter"
    folder.mkdir()
    bus = await Bus.connect(processes.server.url, "test")
    try:
        world = World(no_more, bus, processes.model_dir)
        await world.upload(DATA)
        await world.upload(HELD_OUT, "file-2")
        job = await disturbed(world, processes, "executor", "distillation")
        assert "positions of the validation file, file-2." in (await drafter_of(world, job))["README.md"].decode()
        for name, data in (await drafter_of(world, job)).items():
            (folder / name).write_bytes(data)
    finally:
        await bus.client.close()
    losses = [loss for _, loss in undisturbed["distillation"][0]]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    config = PlannerConfig(draft=f"features:{folder}", model_dir=str(processes.model_dir))
    assert make_drafter(config, is_calibrated=True).need == FeatureNeed(fingerprint(processes.model_dir), (1, 2, 3), 128)
    assert share_of_right_guesses(folder, processes.model_dir) > 0.2


def share_of_right_guesses(folder: Path, model_dir: Path) -> float:
    """How often the planner's drafter foresees what the model likes most, within the answers that it was trained on."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    drafter, num_right, num_all = FeaturesDrafter(FeaturesHead(folder), min_prob=1e-9, min_gain=0.0), 0, 0
    for text in read_dataset(DATA, ChatTokenizer.load(model_dir), 512).sequences:
        kept: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0][0]))
        with torch.no_grad():
            out = model(torch.tensor([text.tokens]), output_hidden_states=True)
        hook.remove()
        rows = (
            torch.cat([out.hidden_states[1][0], out.hidden_states[2][0], kept[0]], dim=1)
            .to(torch.bfloat16)
            .view(torch.int16)
            .numpy()
        )
        for end in (end for end in range(2, len(text.tokens)) if text.in_loss[end]):
            drafter.open(("x", "r"), text.tokens[:end], features=rows[max(0, end - 129) : end - 1].tobytes())
            (pool,) = drafter.draft([DraftOrder(("x", "r"), 1, 1)])
            num_right += pool.tokens[int(np.argmax(pool.probs))] == int(out.logits[0, end - 1].argmax())
            num_all += 1
    return num_right / num_all


async def no_more() -> Bus:
    """What a World of processes may ask for."""
    raise AssertionError("the processes have connections of their own")
