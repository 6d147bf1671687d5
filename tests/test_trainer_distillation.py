"""Distillation as a job of the trainer: what may be asked for, what executors are told, and the folder that comes of it.

tests/test_finetune_kills.py has the whole way, through real processes and a kill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from common.bus import Bus
from common.chat import ChatTokenizer
from common.messages import JobEvent
from services.trainer.dataset import Dataset, TrainingSequence, read_dataset
from services.trainer.drafter import drafter_files, start_steps
from services.trainer.schedule import StepPlan
from services.trainer.spec import ApiError, job_hyperparameters, job_lora, parse_create
from tests.executor_stage import Connect
from tests.trainer_fakes import MODEL, example, write_model_dir
from tests.trainer_world import World, eventually

BODY = {"model": MODEL, "training_file": "file-1", "seed": 3}
ANSWERS = ("one two three four", "five six seven", "eight nine ten eleven twelve")
DATA = b"".join(example(ANSWERS[i % 3] * 3, question=str(i % 3)) for i in range(9))
METHOD = {
    "type": "distillation",
    "distillation": {"hyperparameters": {"n_epochs": 5, "batch_size": 3, "learning_rate": 0.01, "vocabulary_size": 200}},
}


def test_a_distillation_has_its_own_hyperparameters() -> None:
    spec = parse_create(BODY | {"method": METHOD}, new_seed=7)
    assert spec.drafter is not None
    assert (spec.drafter.vocabulary_size, spec.drafter.num_steps, spec.learning_rate) == (200, 3, 0.01)
    assert job_lora(spec) == {}
    assert job_hyperparameters(spec) == {
        "n_epochs": 5, "batch_size": 3, "learning_rate_multiplier": 1.0, "learning_rate": 0.01, "vocabulary_size": 200,
        "num_steps": 3,
    }  # fmt: skip
    plain = parse_create(BODY | {"method": {"type": "distillation"}}, new_seed=7)
    assert plain.drafter is not None
    assert (plain.drafter.vocabulary_size, plain.learning_rate) == (10_240, 4e-4)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"lora": {"rank": 4}}, "lora"),
        ({"suffix": "mine"}, "suffix"),
        ({"hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        ({"method": METHOD | {"supervised": {}}}, "method.supervised"),
        ({"method": METHOD | {"type": "supervised"}}, "method.distillation"),
        ({"method": {"type": "distillation", "distillation": {"hyperparameters": {"num_steps": 7}}}},
         "method.distillation.hyperparameters.num_steps"),
        ({"method": {"type": "distillation", "distillation": {"hyperparameters": {"rank": 7}}}},
         "method.distillation.hyperparameters.rank"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"num_steps": 1}}}},
         "method.supervised.hyperparameters.num_steps"),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_the_method_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_create(BODY | {"method": METHOD} | changes, new_seed=7)
    assert (caught.value.reply.status, caught.value.reply.param) == (400, param)


@pytest.fixture
async def world(connect: Connect, bus: Bus, tmp_path: Path) -> AsyncIterator[World]:
    made = World(connect, bus, write_model_dir(tmp_path / "model"))
    yield made
    await made.end()


async def test_the_executor_is_told_what_the_drafter_can_say(world: World) -> None:
    await world.upload(DATA)
    await world.trainer()
    executor = await world.executor(permits=0)
    job = await world.create(method=METHOD, hyperparameters=None)
    assert (job.method, job.lora) == ("distillation", {})
    await world.until(job.id, lambda record: record.job.status == "running")
    drafter = executor.opened[0].drafter
    assert drafter is not None
    assert (len(drafter.vocabulary), drafter.num_steps, drafter.start_steps) == (200, 3, 3)
    dataset = read_dataset(DATA, ChatTokenizer.load(world._model_dir), 2048)
    answered = {token for each in dataset.sequences for token, is_in in zip(each.tokens, each.in_loss, strict=True) if is_in}
    assert answered <= set(drafter.vocabulary)
    await world.ask("cancel", job.id)


async def test_a_distillation_pauses_resumes_and_is_cancelled(world: World) -> None:
    await world.upload(DATA)
    await world.trainer()
    executor = await world.executor(permits=4)
    job = await world.create(method=METHOD, hyperparameters=None)
    await world.until(job.id, lambda record: record.job.step == 4)
    await world.ask("pause", job.id)
    await executor.allow(2)
    record = await world.until(job.id, lambda record: record.job.status == "paused")
    assert (record.checkpoints, record.checkpoint) == ((), f"{job.id}/step-{record.checkpoint_step}")
    assert 4 < record.checkpoint_step <= 6
    assert await world.stored() == {record.checkpoint, f"{record.checkpoint}.optimizer"}
    await world.ask("resume", job.id)
    await eventually(lambda: len(executor.opened) == 2)
    assert executor.opened[1].checkpoint == record.checkpoint
    assert executor.opened[1].drafter == executor.opened[0].drafter
    await executor.allow(1)
    await world.until(job.id, lambda resumed: resumed.job.step > record.checkpoint_step)
    await world.ask("cancel", job.id)
    async with asyncio.timeout(10):
        while await world.stored():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await world.ask("get", job.id)).result_files == ()


async def test_a_drafter_is_scored_on_the_validation_file(world: World) -> None:
    await world.upload(DATA)
    await world.upload(DATA[: DATA.index(b"\n") + 1] * 2, "file-2")
    await world.trainer()
    executor = await world.executor(permits=4)
    job = await world.create(method=METHOD, hyperparameters=None, validation_file="file-2")
    await world.until(job.id, lambda record: record.job.step == 4)
    metrics = [event.data for event in (await world.ask("events", job.id, limit=100)).data if event.type == "metrics"]
    assert [m["step"] for m in metrics if "full_valid_mean_token_accuracy" in m][-1] == 3
    assert executor.evaluated[:2] == [(3, 0), (3, 1)]
    await world.ask("cancel", job.id)


async def test_rows_without_an_answer_name_the_command_that_has_the_model_answer(world: World) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "what?"}]}).encode() + b"\n"
    await world.upload(DATA + row)
    await world.trainer()
    await world.executor(permits=0)
    job = await world.until_status((await world.create(method=METHOD, hyperparameters=None)).id, "failed")
    assert job.error is not None
    assert "line 10: there is no assistant message to learn" in job.error.message
    assert job.error.message.endswith("use `heddle distill`")


def test_a_small_part_of_the_steps_gives_the_first_weights() -> None:
    plan = StepPlan(num_sequences=1000, batch_size=4, n_epochs=3, seed=0)
    assert start_steps(plan, 200_000) == 25
    assert start_steps(plan, 2_000_000) == 3
    assert start_steps(plan, 20_000) == 187
    assert start_steps(StepPlan(num_sequences=3, batch_size=1, n_epochs=1, seed=0), 90) == 0


def test_the_folder_has_a_card_and_the_config_of_the_weights() -> None:
    config = {"format": "heddle-features-1", "feature_layers": [1, 3], "fingerprint": "0123"}
    tensors = {
        "vocabulary_V": torch.arange(7),
        "embedding_VH": torch.zeros(8, 4, dtype=torch.int8), "embedding_VH_scale": torch.zeros(8),
        "o.weight": torch.zeros(4, 6, dtype=torch.int8), "o.weight_scale": torch.zeros(4), "final_norm_H": torch.zeros(4),
    }  # fmt: skip
    weights = safetensors.torch.save(tensors, metadata={"config": json.dumps(config)})
    spec = parse_create(BODY | {"method": METHOD}, new_seed=7)
    validated = parse_create(BODY | {"method": METHOD, "validation_file": "file-2"}, new_seed=7)
    dataset = Dataset((TrainingSequence((1, 2, 3), (False, True, True)),))
    shares = [{"train_mean_token_accuracy": share} for share in (0.25, 0.75)]
    metrics = [JobEvent(id="", created_at=0, level="info", message="", data=data) for data in shares]
    files = {name: data for _, name, data in drafter_files(weights, spec, dataset, metrics)}
    assert files["drafter.safetensors"] == weights
    assert json.loads(files["config.json"]) == config
    text = files["README.md"].decode()
    held_out = {"full_valid_mean_token_accuracy": 0.125, "full_valid_loss": 2.0}
    scored = [*metrics, JobEvent(id="", created_at=0, level="info", message="", data=held_out)]
    told = {name: data for _, name, data in drafter_files(weights, validated, dataset, scored)}["README.md"].decode()
    assert "at 12% of the positions of the validation file, file-2." in told.replace("\n", " ")
    for fact in ("layers 1, 3", "28 trained parameters, 7 of", "`0123`", "1 conversations", "2\ntokens", "at 50% of"):
        assert fact.replace("\n", " ") in text.replace("\n", " "), fact
