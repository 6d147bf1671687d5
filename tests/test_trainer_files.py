"""Training files that go, cannot be read, or hold what no executor trains on: the job says so and nothing spins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from common import subjects
from common.bus import Bus
from tests.trainer_fakes import example, write_model_dir
from tests.trainer_world import World

DATA = b"".join(example("answer " * (i + 1)) for i in range(5))


@pytest.fixture
async def world(connect: Callable[[], Awaitable[Bus]], bus: Bus, tmp_path: Path) -> AsyncIterator[World]:
    made = World(connect, bus, write_model_dir(tmp_path / "model"))
    await made.upload(DATA)
    yield made
    await made.end()


async def lose_chunks(world: World) -> None:
    """The files are listed as before, but what they hold never arrives."""
    store = f"OBJ_{subjects.FILES_STORE}"
    await world.bus.js.purge_stream(store, subject=f"$O.{subjects.FILES_STORE}.C.>")


async def warnings(world: World, job_id: str) -> list[str]:
    """Oldest first."""
    return [event.message for event in reversed((await world.ask("events", job_id)).data) if event.level == "warn"]


async def test_a_file_deleted_while_its_job_runs_fails_the_job_at_the_next_claim(world: World) -> None:
    first = await world.trainer("t1")
    executor = await world.executor(permits=5)
    job = await world.create()
    await world.until(job.id, lambda record: record.job.step == 5)
    await (await world.bus.object_store(subjects.FILES_STORE)).delete("file-1")
    await first.vanish()
    second = await world.trainer("t2")
    failed = await world.until_status(job.id, "failed")
    assert failed.error is not None
    assert (failed.error.message, failed.error.param) == ("file file-1 does not exist any more", "training_file")
    await second.idle()
    assert second.actor.vitals().counters["jobs_failed"] == 1
    assert len(executor.opened) == 1


async def test_a_file_that_cannot_be_read_fails_the_job_after_some_tries(world: World) -> None:
    trainer = await world.trainer(open_timeout_s=0.1, max_file_reads=3, file_retry_s=0.02)
    await world.executor()
    await lose_chunks(world)
    job = await world.create()
    failed = await world.until_status(job.id, "failed")
    assert failed.error is not None
    assert failed.error.message == "file file-1 could not be read in 3 tries; the last: TimeoutError"
    tries = [f"Training file file-1 could not be read (try {number} of 3): TimeoutError" for number in (1, 2, 3)]
    assert await warnings(world, job.id) == tries
    await trainer.idle()


async def test_a_file_that_can_be_read_again_is_trained_on(world: World) -> None:
    await world.trainer(open_timeout_s=0.2, file_retry_s=0.2)
    await world.executor()
    await lose_chunks(world)
    job = await world.create()
    while not await warnings(world, job.id):
        pass
    await world.upload(DATA)
    await world.until_status(job.id, "succeeded")


async def test_a_job_cancelled_between_two_tries_is_let_go(world: World) -> None:
    trainer = await world.trainer(open_timeout_s=0.1, file_retry_s=60.0)
    await world.executor()
    await lose_chunks(world)
    job = await world.create()
    while not await warnings(world, job.id):
        pass
    await world.ask("cancel", job.id)
    await trainer.idle()
    assert (await world.ask("get", job.id)).status == "cancelled"


@pytest.mark.parametrize(
    ("setting", "trainable", "told"),
    [
        (2048, 60, "the limit is 60 (the executors' KV pages and the model's positions)"),
        (50, 60, "the limit is 50 (HEDDLE_TRAINER_MAX_SEQUENCE_LENGTH)"),
    ],
)
async def test_an_example_longer_than_the_limit_is_an_error_with_its_line_and_the_limits_cause(
    world: World, setting: int, trainable: int, told: str
) -> None:
    await world.trainer(max_sequence_length=setting)
    await world.executor(max_training_tokens=trainable)
    await world.upload(example("fine") + example("long " * 20), "file-long")
    failed = await world.until_status((await world.create(training_file="file-long")).id, "failed")
    assert failed.error is not None
    assert failed.error.message.startswith("line 2: ")
    assert failed.error.message.endswith(f" tokens, {told}")
