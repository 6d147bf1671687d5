"""The trainer against a fake executor on a real server: pause, resume, cancel, the queue, and who takes from it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from common.bus import Bus, RemoteError
from common.chat import ChatTokenizer
from common.messages import ErrorReply
from services.trainer.job_table import JobTable
from services.trainer.jobs import JobRecord
from tests.trainer_fakes import example, write_model_dir
from tests.trainer_world import World, eventually, expected_state

DATA = b"".join(example("answer " * (i + 1)) for i in range(5))
"""Five examples in batches of 2: 3 steps an epoch, 6 in two epochs."""


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model_dir(tmp_path / "model")


@pytest.fixture
async def world(connect: Callable[[], Awaitable[Bus]], bus: Bus, model_dir: Path) -> AsyncIterator[World]:
    made = World(connect, bus, model_dir)
    await made.upload(DATA)
    yield made
    await made.end()


async def refused(call: Awaitable[object]) -> ErrorReply:
    with pytest.raises(RemoteError) as error:
        await call
    return error.value.reply


async def test_pause_writes_a_checkpoint_and_resume_goes_on_from_it(world: World, model_dir: Path) -> None:
    await world.trainer()
    executor = await world.executor(permits=4)
    job = await world.create(hyperparameters={"n_epochs": 3, "batch_size": 2})
    await world.until(job.id, lambda record: record.job.step == 4)
    assert (await world.ask("pause", job.id)).status == "running"
    await executor.allow(None)
    step = (await world.until(job.id, lambda record: record.job.status == "paused")).checkpoint_step
    assert 4 < step <= 6
    assert executor.leases == {}
    assert (await refused(world.ask("pause", job.id))).status == 409
    assert (await world.ask("resume", job.id)).status == "queued"
    assert (await refused(world.ask("resume", job.id))).status == 409
    record = await world.until(job.id, lambda record: record.job.status == "succeeded")
    assert [order.checkpoint for order in executor.opened] == [None, f"{job.id}/step-{step}"]
    state = expected_state(ChatTokenizer.load(model_dir), DATA, record.spec)
    assert await world.artifact(f"{job.id}/step-9") == {"step": 9, "state": state}
    assert [number for number, _ in await world.losses(job.id)] == list(range(1, 10))


async def test_a_queued_job_pauses_at_once_and_resumes(world: World) -> None:
    await world.trainer(max_concurrent_jobs=1)
    executor = await world.executor(permits=0)
    first = await world.create()
    await world.until_status(first.id, "running")
    second = await world.create()
    await world.until_status(second.id, "queued")
    assert (await world.ask("pause", second.id)).status == "paused"
    await executor.allow(None)
    await world.until_status(first.id, "succeeded")
    assert (await world.ask("get", second.id)).status == "paused"
    await world.ask("resume", second.id)
    await world.until_status(second.id, "succeeded")


async def test_cancel_ends_a_running_job_at_once(world: World) -> None:
    await world.trainer()
    executor = await world.executor(permits=4)
    job = await world.create()
    await world.until(job.id, lambda record: record.job.step == 4)
    cancelled = await world.ask("cancel", job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    await eventually(lambda: not executor.leases)
    assert (await refused(world.ask("cancel", job.id))).status == 409
    await executor.allow(None)
    assert (await world.ask("get", job.id)) == cancelled
    assert (await world.ask("events", job.id)).data[0].message == "The job was cancelled"


async def test_a_queued_job_is_cancelled(world: World) -> None:
    await world.trainer(max_concurrent_jobs=1)
    await world.executor(permits=0)
    first = await world.create()
    await world.until_status(first.id, "running")
    second = await world.create()
    await world.until_status(second.id, "queued")
    assert (await world.ask("cancel", second.id)).status == "cancelled"


async def test_more_jobs_than_slots_wait_in_order(world: World) -> None:
    trainer = await world.trainer(max_concurrent_jobs=2)
    executor = await world.executor(permits=0)
    created = []
    for status in ("running", "running", "queued"):  # one by one: a job that is validated sooner would start sooner
        created.append(await world.create())
        await world.until_status(created[-1].id, status)
    await eventually(lambda: trainer.actor.vitals().gauges == {"jobs_running": 2, "jobs_queued": 1})
    await executor.allow(None)
    for job in created:
        await world.until_status(job.id, "succeeded")
    assert [order.job_id for order in executor.opened][2] == created[2].id


async def test_a_stale_picture_of_the_table_starts_no_job_beyond_the_slots(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = JobTable.watch

    async def stale(table: JobTable) -> AsyncGenerator[JobRecord, None]:
        async for record in fresh(table):
            if record.job.status == "validating_files":
                yield record

    monkeypatch.setattr(JobTable, "watch", stale)
    trainer = await world.trainer(max_concurrent_jobs=1)
    await world.executor(permits=0)
    first = await world.create()
    await world.until_status(first.id, "running")
    second = await world.create()
    await world.until(second.id, lambda record: record.job.status in ("queued", "running"))
    await eventually(lambda: trainer.actor.vitals().gauges == {"jobs_running": 1, "jobs_queued": 1})
    assert (await world.ask("get", second.id)).status == "queued"


async def test_cancelling_the_job_of_a_dead_trainer_frees_the_executor(world: World) -> None:
    first = await world.trainer("t1", lease_s=60.0)
    executor = await world.executor(permits=1)
    job = await world.create()
    await world.until(job.id, lambda record: record.job.step == 1)
    await world.trainer("t2")
    await first.vanish()
    assert (await world.ask("cancel", job.id)).status == "cancelled"
    await eventually(lambda: not executor.leases)


async def test_two_trainers_never_run_the_same_job(world: World) -> None:
    trainers = [await world.trainer(f"t{i}") for i in range(2)]
    executor = await world.executor()
    created = [await world.create() for _ in range(8)]
    for job in created:
        await world.until_status(job.id, "succeeded")
    assert sorted(order.job_id for order in executor.opened) == sorted(job.id for job in created)
    steps = [trainer.actor.vitals().counters["steps"] for trainer in trainers]
    assert sum(steps) == 8 * 6
    assert min(steps) > 0
