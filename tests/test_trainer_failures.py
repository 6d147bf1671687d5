"""What dies, hangs, gets lost or comes twice while a job trains: every step still counts exactly once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from common import subjects
from common.bus import Bus
from common.chat import ChatTokenizer
from common.messages import FineTuningJob, StepDone
from common.nats_server import NatsServer
from tests.trainer_fakes import example, write_model_dir
from tests.trainer_world import World, eventually, expected_state

DATA = b"".join(example("answer " * (i + 1)) for i in range(5))
NUM_STEPS = 6


@pytest.fixture
async def world(connect: Callable[[], Awaitable[Bus]], bus: Bus, tmp_path: Path) -> AsyncIterator[World]:
    made = World(connect, bus, write_model_dir(tmp_path / "model"))
    await made.upload(DATA)
    yield made
    await made.end()


async def assert_trained_exactly_once(world: World, job: FineTuningJob, tmp_path: Path) -> None:
    """The job succeeds; its final state is that of an undisturbed run; each step has a metrics event, or is said to lack it."""
    record = await world.until(job.id, lambda record: record.job.status in ("succeeded", "failed"))
    assert record.job.error is None
    state = expected_state(ChatTokenizer.load(tmp_path / "model"), DATA, record.spec)
    assert await world.artifact(f"{job.id}/step-{NUM_STEPS}") == {"step": NUM_STEPS, "state": state}
    losses = await world.losses(job.id)
    lost = [event.message for event in (await world.ask("events", job.id)).data if "were lost" in event.message]
    spans = [tuple(int(n) for n in re.findall(r"\d+", message)) for message in lost]
    without = {step for first, last in spans for step in range(first, last + 1)}
    assert [step for step, _ in losses] == [step for step in range(1, NUM_STEPS + 1) if step not in without]
    assert [loss for _, loss in losses] == pytest.approx([1 / step for step, _ in losses])


async def step_reached(world: World, job: FineTuningJob, step: int) -> None:
    await world.until(job.id, lambda record: record.job.step >= step)


async def test_a_dead_executors_job_goes_on_elsewhere_from_the_last_checkpoint(world: World, tmp_path: Path) -> None:
    await world.trainer()
    first = await world.executor("x1", permits=5)
    job = await world.create()
    await step_reached(world, job, 5)
    second = await world.executor("x2")
    await first.die()
    await assert_trained_exactly_once(world, job, tmp_path)
    assert [order.checkpoint for order in second.opened] == [f"{job.id}/step-3"]
    assert second.opened[0].lease > first.opened[0].lease
    warnings = [event.message for event in (await world.ask("events", job.id)).data if event.level == "warn"]
    assert any("Lost executor x1" in warning for warning in warnings)


async def test_a_job_waits_for_an_executor(world: World, tmp_path: Path) -> None:
    await world.trainer()
    first = await world.executor("x1", permits=1)
    job = await world.create()
    await step_reached(world, job, 1)
    await first.die()
    told: list[str] = []
    while not any("Waiting for an executor" in message for message in told):
        told = [event.message for event in (await world.ask("events", job.id)).data]
    assert (await world.ask("get", job.id)).status == "running"
    await world.executor("x2")
    await assert_trained_exactly_once(world, job, tmp_path)


async def test_a_hanging_executor_is_left(world: World, tmp_path: Path) -> None:
    await world.trainer()
    first = await world.executor("x1", permits=4)
    job = await world.create()
    await step_reached(world, job, 4)
    await first.hang()
    second = await world.executor("x2")
    await assert_trained_exactly_once(world, job, tmp_path)
    assert len(second.opened) == 1


async def test_a_restarted_executor_of_the_same_name_resumes(world: World, tmp_path: Path) -> None:
    await world.trainer()
    first = await world.executor("x", permits=4)
    job = await world.create()
    await step_reached(world, job, 4)
    await first.die()
    again = await world.executor("x", slow_start=True)
    await assert_trained_exactly_once(world, job, tmp_path)
    assert [order.checkpoint for order in again.opened] == [f"{job.id}/step-3"]


async def test_lost_answers_and_repeated_messages_change_nothing(world: World, tmp_path: Path) -> None:
    await world.trainer(request_timeout_s=1.0)
    executor = await world.executor()
    executor.lose_answers = 2
    executor.repeat_steps = True
    job = await world.create()
    await assert_trained_exactly_once(world, job, tmp_path)
    assert len(executor.opened) == 1
    assert executor.slices_seen == 10


async def test_progress_under_an_old_lease_is_ignored(world: World, tmp_path: Path) -> None:
    await world.trainer()
    executor = await world.executor(permits=2)
    job = await world.create()
    await step_reached(world, job, 2)
    stray = StepDone(
        job_id=job.id, lease=executor.leases[job.id] - 1, step=4, loss=9.0, grad_norm=0.0, num_correct=0, num_tokens=1,
        num_sequence_tokens=1, elapsed_ms=1.0,
    )  # fmt: skip
    await executor.bus.publish(subjects.job_progress(job.id), stray)
    await executor.allow(None)
    await assert_trained_exactly_once(world, job, tmp_path)
    assert len(executor.opened) == 1


@pytest.mark.parametrize("lost", [{0}, {1, 2}, {0, 3}], ids=str)
async def test_what_was_lost_on_the_way_is_told_when_a_checkpoint_is_written(world: World, lost: set[int]) -> None:
    await world.trainer(stall_s=0.2)
    executor = await world.executor()
    executor.lose_steps = lost
    job = await world.create()
    await world.until_status(job.id, "succeeded")
    assert len(executor.opened) == 1
    assert [step for step, _ in await world.losses(job.id)] == [1, 2, 3, 4, 5, 6]
    assert all(event.level == "info" for event in (await world.ask("events", job.id, limit=100)).data)


async def test_lost_progress_is_found_by_asking(world: World) -> None:
    """Steps 2 and 3 (from 1) are never reported: the end of the epoch is only known because it is asked for."""
    await world.trainer(stall_s=0.2)
    executor = await world.executor()
    executor.lose_steps = {1, 2}
    executor.forgets_steps = True
    job = await world.create()
    await world.until_status(job.id, "succeeded")
    assert len(executor.opened) == 1
    assert [step for step, _ in await world.losses(job.id)] == [1, 4, 5, 6]
    warnings = [event.message for event in (await world.ask("events", job.id)).data if event.level == "warn"]
    assert warnings == ["The metrics of steps 2 to 3 were lost"]
    assert [c.step_number for c in (await world.ask("checkpoints", job.id)).data] == [6, 3]


async def test_a_slow_executor_is_not_left(world: World, tmp_path: Path) -> None:
    await world.trainer(stall_s=0.1)
    executor = await world.executor(permits=1)
    job = await world.create()
    await world.until(job.id, lambda record: (record.checkpoint or "").startswith(f"{job.id}/latest-"))
    await executor.allow(None)
    await assert_trained_exactly_once(world, job, tmp_path)
    assert len(executor.opened) == 1


async def test_a_busy_executor_takes_slices_when_it_can(world: World, tmp_path: Path) -> None:
    await world.trainer()
    executor = await world.executor(permits=0)
    executor.max_queued = 3
    job = await world.create()
    await eventually(lambda: executor.num_overloaded >= 3)
    await executor.allow(None)
    await assert_trained_exactly_once(world, job, tmp_path)
    assert len(executor.opened) == 1


async def test_the_job_of_a_vanished_trainer_is_taken_over(world: World, tmp_path: Path) -> None:
    first = await world.trainer("t1")
    executor = await world.executor(permits=5)
    job = await world.create()
    await step_reached(world, job, 5)
    second = await world.trainer("t2")
    before = await world.until(job.id, lambda record: True)
    assert before.owner == "t1"
    await first.vanish()
    after = await world.until(job.id, lambda record: record.owner == "t2")
    assert after.lease > before.lease
    await executor.allow(None)
    await assert_trained_exactly_once(world, job, tmp_path)
    assert [order.checkpoint for order in executor.opened] == [None, f"{job.id}/step-3"]
    assert second.actor.vitals().counters["steps"] == 3


async def test_a_job_that_is_taken_over_before_a_checkpoint_starts_once_and_then_over(world: World) -> None:
    first = await world.trainer("t1")
    executor = await world.executor(permits=1)
    job = await world.create()
    await step_reached(world, job, 1)
    await world.trainer("t2")
    await first.vanish()
    await world.until(job.id, lambda record: record.owner == "t2" and record.job.step == 0)
    await executor.allow(None)
    await world.until_status(job.id, "succeeded")
    told = [event.message for event in reversed((await world.ask("events", job.id, limit=100)).data)]
    starts = [message for message in told if message.startswith("Training start")]
    assert starts == ["Training started on executor x", "Training starts over on executor x"]


async def test_a_restarted_trainer_takes_up_its_own_job_at_once(world: World, tmp_path: Path) -> None:
    first = await world.trainer("t", lease_s=60.0)
    executor = await world.executor(permits=5)
    job = await world.create()
    await step_reached(world, job, 5)
    await first.vanish()
    await world.trainer("t", lease_s=60.0)
    await executor.allow(None)
    await assert_trained_exactly_once(world, job, tmp_path)
    assert [order.checkpoint for order in executor.opened] == [None, f"{job.id}/step-3"]


async def test_a_trainer_that_was_asleep_does_no_harm(world: World, tmp_path: Path) -> None:
    """The first trainer cannot renew in time, loses the job, and wakes up: it must not write a word."""
    first = await world.trainer("t1", renew_s=0.3, lease_s=0.9)
    executor = await world.executor(permits=4)
    job = await world.create()
    await step_reached(world, job, 4)
    async with first.asleep():
        await world.trainer("t2")
        await world.until(job.id, lambda record: record.owner == "t2" and record.job.step == 3)
    await executor.allow(None)
    await assert_trained_exactly_once(world, job, tmp_path)
    assert first.actor.vitals().counters["steps"] == 4


async def test_a_stopping_trainer_hands_its_job_over_with_a_checkpoint(world: World, tmp_path: Path) -> None:
    first = await world.trainer("t1", max_steps_in_flight=1)
    executor = await world.executor(permits=4)
    job = await world.create()
    await step_reached(world, job, 4)
    await eventually(lambda: executor.num_queued(job.id) == 2)
    stopping = asyncio.create_task(first.stop())
    await executor.allow(1)
    await stopping
    record = await world.until(job.id, lambda record: True)
    assert (record.job.status, record.owner, record.checkpoint_step) == ("queued", "", 5)
    assert executor.leases == {}
    await executor.allow(None)
    second = await world.trainer("t2")
    await assert_trained_exactly_once(world, job, tmp_path)
    assert first.actor.vitals().counters["steps"] + second.actor.vitals().counters["steps"] == NUM_STEPS


async def test_a_stopping_trainer_does_not_wait_for_ever(world: World, tmp_path: Path) -> None:
    first = await world.trainer("t1", drain_s=0.2)
    executor = await world.executor(permits=4)
    job = await world.create()
    await step_reached(world, job, 4)
    await first.stop()
    record = await world.until(job.id, lambda record: True)
    assert (record.job.status, record.owner, record.checkpoint_step) == ("queued", "", 3)
    await executor.allow(None)
    await world.trainer("t2")
    await assert_trained_exactly_once(world, job, tmp_path)


async def test_a_job_outlives_the_server(world: World, nats_server: NatsServer, tmp_path: Path) -> None:
    trainer = await world.trainer(stall_s=0.5, renew_s=1.0, lease_s=3.0)
    executor = await world.executor(permits=4)
    job = await world.create()
    await step_reached(world, job, 4)
    clients = [world.bus.client, trainer.bus.client, executor.bus.client]
    nats_server.kill()
    await eventually(lambda: not any(client.is_connected for client in clients))
    nats_server.start()
    await eventually(lambda: all(client.is_connected for client in clients))
    await executor.allow(None)
    await assert_trained_exactly_once(world, job, tmp_path)
