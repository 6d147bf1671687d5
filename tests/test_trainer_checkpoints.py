"""Checkpoints between epochs' ends, and what is left of them: a job loses little work and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from common.adapters import AdapterRefusedError, adapter_records, remove_adapter
from common.bus import Bus
from common.chat import ChatTokenizer
from tests.trainer_fakes import example, write_model_dir
from tests.trainer_world import World, eventually, expected_state

DATA = b"".join(example("answer " * (i + 1)) for i in range(6))
ONE_EPOCH = {"n_epochs": 1, "batch_size": 1}
NUM_STEPS = 6
OFTEN_S = 0.01


@pytest.fixture
async def world(connect: Callable[[], Awaitable[Bus]], bus: Bus, tmp_path: Path) -> AsyncIterator[World]:
    made = World(connect, bus, write_model_dir(tmp_path / "model"))
    await made.upload(DATA)
    yield made
    await made.end()


async def until_stored(world: World, names: set[str]) -> None:
    """Wait until the store holds exactly these artifacts: deletions come after the record's change."""
    stored: set[str] | None = None
    try:
        async with asyncio.timeout(10):
            while (stored := await world.stored()) != names:
                pass
    except TimeoutError:
        raise AssertionError(f"stored are {stored}") from None


async def test_a_job_of_one_epoch_resumes_between_its_ends(world: World, tmp_path: Path) -> None:
    await world.trainer(checkpoint_every_s=OFTEN_S)
    first = await world.executor("x1", permits=4)
    job = await world.create(hyperparameters=ONE_EPOCH)
    record = await world.until(job.id, lambda record: record.checkpoint_step == 4)
    assert (await world.ask("checkpoints", job.id)).data == ()
    second = await world.executor("x2")
    await first.die()
    done = await world.until(job.id, lambda record: record.job.status == "succeeded")
    assert [order.checkpoint for order in second.opened] == [record.checkpoint]
    state = expected_state(ChatTokenizer.load(tmp_path / "model"), DATA, done.spec)
    assert await world.artifact(f"{job.id}/step-{NUM_STEPS}") == {"step": NUM_STEPS, "state": state}
    assert [step for step, _ in await world.losses(job.id)] == list(range(1, NUM_STEPS + 1))
    assert [c.step_number for c in (await world.ask("checkpoints", job.id)).data] == [NUM_STEPS]
    await until_stored(world, {f"{job.id}/step-{NUM_STEPS}"})


async def test_steps_in_flight_go_on_while_a_checkpoint_is_written(world: World) -> None:
    await world.trainer(checkpoint_every_s=OFTEN_S, max_steps_in_flight=2)
    executor = await world.executor(permits=1)
    job = await world.create(hyperparameters=ONE_EPOCH)
    record = await world.until(job.id, lambda record: record.checkpoint_step == 1)
    await eventually(lambda: executor.num_queued(job.id) == 2)
    for step in (2, 3):
        await executor.allow(1)
        following = await world.until(job.id, lambda record, step=step: record.checkpoint_step == step)  # type: ignore[misc]
        assert following.checkpoint != record.checkpoint
        await until_stored(world, {f"{following.checkpoint}", f"{following.checkpoint}.optimizer"})
        record = following
    assert len(executor.opened) == 1


async def test_without_new_steps_nothing_is_written(world: World) -> None:
    await world.trainer(checkpoint_every_s=OFTEN_S)
    executor = await world.executor(permits=1)
    job = await world.create(hyperparameters=ONE_EPOCH)
    record = await world.until(job.id, lambda record: record.checkpoint_step == 1)
    await world.until(job.id, lambda later: later.lease_expires_at > record.lease_expires_at + 0.3)
    assert executor.num_writes == 1


async def test_adapters_of_epochs_stay_and_optimizers_go(world: World) -> None:
    await world.trainer()
    executor = await world.executor(permits=NUM_STEPS)
    job = await world.create(hyperparameters={"n_epochs": 3, "batch_size": 2})
    await world.until(job.id, lambda record: record.checkpoint_step == 6)
    await until_stored(world, {f"{job.id}/step-3", f"{job.id}/step-6", f"{job.id}/step-6.optimizer"})
    await executor.allow(None)
    await world.until_status(job.id, "succeeded")
    await until_stored(world, {f"{job.id}/step-{step}" for step in (3, 6, 9)})
    listed = (await world.ask("checkpoints", job.id)).data
    served = await adapter_records(world.bus)
    final = (await world.ask("get", job.id)).fine_tuned_model
    for checkpoint in listed:
        assert served[checkpoint.fine_tuned_model_checkpoint].artifact == f"{job.id}/step-{checkpoint.step_number}"
    assert served.keys() == {checkpoint.fine_tuned_model_checkpoint for checkpoint in listed}
    assert listed[0].fine_tuned_model_checkpoint == final, "the last epoch's weights are the finished model's"
    await remove_adapter(world.bus, final)
    await until_stored(world, {f"{job.id}/step-{step}" for step in (3, 6)})
    for checkpoint in listed[1:]:
        await remove_adapter(world.bus, checkpoint.fine_tuned_model_checkpoint)
    await until_stored(world, set())
    assert await adapter_records(world.bus) == {}


async def test_what_a_pause_stores_is_no_model_and_goes_when_the_job_goes_on(world: World, tmp_path: Path) -> None:
    data = DATA * 10
    await world.upload(data)
    await world.trainer()
    executor = await world.executor(permits=3)
    job = await world.create(hyperparameters=ONE_EPOCH)
    await world.until(job.id, lambda record: record.job.step == 3)
    await world.ask("pause", job.id)
    await executor.allow(50)
    paused = await world.until(job.id, lambda record: record.job.status == "paused")
    assert 3 <= paused.checkpoint_step < 60
    assert (paused.checkpoint, paused.checkpoints) == (f"{job.id}/step-{paused.checkpoint_step}", ())
    assert await adapter_records(world.bus) == {}
    await world.ask("resume", job.id)
    await executor.allow(None)
    done = await world.until(job.id, lambda record: record.job.status == "succeeded")
    assert [order.checkpoint for order in executor.opened] == [None, paused.checkpoint]
    assert (await adapter_records(world.bus)).keys() == {done.job.fine_tuned_model}
    await until_stored(world, {f"{job.id}/step-60"})
    state = expected_state(ChatTokenizer.load(tmp_path / "model"), data, done.spec)
    assert await world.artifact(f"{job.id}/step-60") == {"step": 60, "state": state}


async def test_a_cancelled_job_leaves_nothing_and_others_keep_theirs(world: World) -> None:
    await world.trainer()
    executor = await world.executor()
    other = await world.create(hyperparameters=ONE_EPOCH)
    await world.until_status(other.id, "succeeded")
    await executor.allow(3)
    job = await world.create(hyperparameters={"n_epochs": 2, "batch_size": 2})
    await world.until(job.id, lambda record: record.checkpoint_step == 3)
    (checkpoint,) = (await world.ask("checkpoints", job.id)).data
    with pytest.raises(AdapterRefusedError, match="may resume from"):
        await remove_adapter(world.bus, checkpoint.fine_tuned_model_checkpoint)
    await world.ask("cancel", job.id)
    await until_stored(world, {f"{other.id}/step-{NUM_STEPS}"})
    assert (await world.ask("checkpoints", job.id)).data == ()
    assert {record.job_id for record in (await adapter_records(world.bus)).values()} == {other.id}


async def test_the_cancelled_job_of_a_dead_trainer_leaves_nothing(world: World) -> None:
    first = await world.trainer("t1", lease_s=60.0)
    await world.executor(permits=3)
    job = await world.create(hyperparameters={"n_epochs": 2, "batch_size": 2})
    await world.until(job.id, lambda record: record.checkpoint_step == 3)
    await world.trainer("t2")
    await first.vanish()
    await world.ask("cancel", job.id)
    await until_stored(world, set())


async def test_a_failed_job_leaves_nothing(world: World) -> None:
    await world.trainer()
    executor = await world.executor()
    executor.fail_at = 4
    job = await world.create(hyperparameters={"n_epochs": 2, "batch_size": 2})
    await world.until_status(job.id, "failed")
    await until_stored(world, set())
    assert len(executor.opened) == 1
