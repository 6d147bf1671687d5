"""Validation files: checked with the training file, scored at each epoch's end, told in events and checkpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.bus import Bus, RemoteError
from common.messages import FineTuningJob
from tests.executor_stage import Connect
from tests.trainer_fakes import example, write_model_dir
from tests.trainer_world import World

DATA = b"".join(example("answer " * (i + 1)) for i in range(5))
VALIDATION = b"".join(example("other " * (i + 1)) for i in range(12))


@pytest.fixture
async def world(connect: Connect, bus: Bus, tmp_path: Path) -> AsyncIterator[World]:
    made = World(connect, bus, write_model_dir(tmp_path / "model"))
    await made.upload(DATA)
    await made.upload(VALIDATION, "file-2")
    yield made
    await made.end()


async def assert_scored(world: World, job: FineTuningJob) -> None:
    """The means after 3 and 6 steps are told once, in the metrics of the steps before them and in the checkpoints."""
    metrics = [event.data for event in (await world.ask("events", job.id, limit=100)).data if event.type == "metrics"]
    assert [(m["step"], m.get("full_valid_loss")) for m in reversed(metrics)] == [
        (1, None), (2, None), (3, 7.0), (4, None), (5, None), (6, 4.0),
    ]  # fmt: skip
    checkpoints = (await world.ask("checkpoints", job.id)).data
    assert [(c.step_number, c.metrics["full_valid_loss"]) for c in checkpoints] == [(6, 4.0), (3, 7.0)]
    assert all(0.4 < c.metrics["full_valid_mean_token_accuracy"] <= 0.5 for c in checkpoints)


async def test_each_epoch_ends_with_the_validation_files_mean(world: World) -> None:
    await world.trainer()
    executor = await world.executor()
    job = await world.create(validation_file="file-2")
    assert job.validation_file == "file-2"
    await world.until_status(job.id, "succeeded")
    assert executor.evaluated == [(step, index) for step in (3, 6) for index in range(12)]
    await assert_scored(world, job)
    story = [event.message for event in reversed((await world.ask("events", job.id, limit=100)).data)]
    assert story[1].startswith("Validation file validated: 12 examples, ")


async def test_lost_scores_are_asked_for_again(world: World) -> None:
    await world.trainer(stall_s=0.8)
    executor = await world.executor()
    executor.lose_scores = {0, 7, 11}
    job = await world.create(validation_file="file-2")
    await world.until_status(job.id, "succeeded")
    assert len(executor.evaluated) == 24 + 3
    assert len(executor.opened) == 1
    await assert_scored(world, job)


async def test_an_executor_that_dies_while_it_scores_costs_no_score(world: World) -> None:
    await world.trainer()
    first = await world.executor("a")
    first.lose_scores = {5}
    job = await world.create(validation_file="file-2")
    await world.until(job.id, lambda record: record.job.step == 3 and len(first.evaluated) == 12)
    await first.die()
    await world.executor("b")
    await world.until_status(job.id, "succeeded")
    await assert_scored(world, job)


async def test_a_bad_validation_file_fails_the_job_before_it_is_queued(world: World) -> None:
    await world.trainer()
    executor = await world.executor()
    await world.upload(example("fine") + b"{}\n", "file-bad")
    job = await world.create(validation_file="file-bad")
    failed = await world.until_status(job.id, "failed")
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_validation_file", "validation_file")
    assert failed.error.message.startswith("line 2: ")
    assert executor.opened == []
    with pytest.raises(RemoteError) as error:
        await world.create(validation_file="nowhere")
    assert (error.value.reply.status, error.value.reply.param) == (400, "validation_file")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_a_file_of_another_purpose_is_refused(world: World, param: str) -> None:
    await world.trainer()
    await world.executor()
    await world.upload(DATA, "file-other", purpose="assistants")
    with pytest.raises(RemoteError, match="fine-tune") as error:
        await world.create(**{param: "file-other"})
    assert (error.value.reply.status, error.value.reply.param) == (400, param)
    assert "assistants" in error.value.reply.message
    assert (await world.ask("list")).data == ()
