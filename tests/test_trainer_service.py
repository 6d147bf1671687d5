"""The trainer against a fake executor on a real server: the life of a job and the API."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from common import subjects
from common.bus import Bus, RemoteError
from common.chat import ChatTokenizer
from common.codec import decode
from common.messages import AdapterRecord, ErrorReply, Rejected
from common.nats_server import NatsServer
from services.trainer.config import TrainerConfig
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


async def test_a_job_from_creation_to_a_served_adapter(world: World, model_dir: Path) -> None:
    trainer, executor = await world.trainer(), await world.executor()
    job = await world.create(suffix="mine", metadata={"k": "v"}, lora={"rank": 4, "learning_rate": 0.01, "warmup_steps": 2})
    assert job.status == "validating_files"
    done = await world.until_status(job.id, "succeeded")

    tokenizer = ChatTokenizer.load(model_dir)
    tokens_per_epoch = sum(len(tokenizer.encode(f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{'answer ' * (i + 1)}"))
                           + 2 for i in range(5))  # fmt: skip
    assert done.trained_tokens == 2 * tokens_per_epoch
    assert done.fine_tuned_model == f"ft:base::mine:{job.id.removeprefix('ftjob-')}"
    assert (done.step, done.total_steps, done.metadata, done.error) == (6, 6, {"k": "v"}, None)
    assert done.finished_at is not None
    assert done.finished_at >= done.created_at

    key = subjects.adapter_key(done.fine_tuned_model)
    adapter = decode((await (await world.bus.key_value(subjects.ADAPTERS_BUCKET)).get(key)).value or b"", AdapterRecord)
    assert (adapter.name, adapter.base_model, adapter.job_id, adapter.lora.rank) == (done.fine_tuned_model, "base", job.id, 4)
    record = await world.until(job.id, lambda record: True)
    stored = await world.artifact(adapter.artifact)
    assert stored == {"step": 6, "state": expected_state(tokenizer, DATA, record.spec)}
    assert [(order.lora.rank, order.checkpoint) for order in executor.opened] == [(4, None)]
    assert executor.leases == {}

    await trainer.idle()
    vitals = trainer.actor.vitals()
    assert vitals.counters == {"steps": 6, "trained_tokens": 2 * tokens_per_epoch, "jobs_succeeded": 1, "jobs_failed": 0}
    assert vitals.gauges == {"jobs_running": 0, "jobs_queued": 0}


async def test_events_and_checkpoints_tell_the_story(world: World) -> None:
    await world.trainer()
    await world.executor()
    job = await world.create(lora={"learning_rate": 0.01, "warmup_steps": 2})
    await world.until_status(job.id, "succeeded")
    page = await world.ask("events", job.id, limit=100)
    assert not page.has_more
    story = [event.message for event in reversed(page.data)]
    assert story[0] == f"Created finetuning job: {job.id}"
    assert story[1].startswith("Training file validated: 5 examples, ")
    assert story[2:4] == ["Training started on executor x", "Step 1/6: training loss=1.0000"]
    assert story[6:8] == ["Epoch 1/2 completed", "Checkpoint created at step 3"]
    assert story[-1].startswith("New fine-tuned model created: ft:base::heddle:")
    assert len(story) == 14

    metrics = [event.data for event in reversed(page.data) if event.type == "metrics"]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert [m["learning_rate"] for m in metrics] == pytest.approx([0, 0.005, 0.01, 0.0075, 0.005, 0.0025])
    assert [m["train_loss"] for m in metrics] == pytest.approx([1 / step for step in range(1, 7)])
    assert all(m["train_mean_token_accuracy"] == pytest.approx(0.5, abs=0.05) for m in metrics)
    assert all(m["tokens_per_second"] > 1000 and m["grad_norm"] == 0.5 for m in metrics)

    validated = page.data[-2].data
    assert (validated["examples"], validated["total_steps"]) == (5, 6)
    assert 0 < validated["trained_tokens"] < validated["tokens"]

    checkpoints = await world.ask("checkpoints", job.id)
    assert [c.step_number for c in checkpoints.data] == [6, 3]
    assert checkpoints.data[0].metrics["train_loss"] == pytest.approx(1 / 6)
    assert checkpoints.data[1].fine_tuned_model_checkpoint.endswith(":ckpt-step-3")
    first = await world.ask("checkpoints", job.id, limit=1)
    assert first.has_more
    rest = await world.ask("checkpoints", job.id, after=first.data[0].id)
    assert [c.step_number for c in rest.data] == [3]
    assert (await refused(world.ask("checkpoints", job.id, after="x"))).param == "after"


async def test_events_come_in_pages(world: World) -> None:
    await world.trainer()
    await world.executor()
    job = await world.create()
    await world.until_status(job.id, "succeeded")
    everything = (await world.ask("events", job.id, limit=100)).data
    collected = []
    after, more = "", True
    while more:
        page = await world.ask("events", job.id, after=after, limit=5)
        collected += page.data
        after, more = page.data[-1].id, page.has_more
    assert collected == list(everything)
    assert len({event.id for event in collected}) == len(collected)
    assert (await refused(world.ask("events", job.id, after="ftevent-other-1"))).param == "after"
    assert (await refused(world.ask("events", job.id, limit=0))).param == "limit"


async def test_jobs_are_listed_newest_first(world: World) -> None:
    await world.trainer()
    assert (await world.ask("list")).data == ()
    await world.executor(permits=0)
    ids = [(await world.create()).id for _ in range(3)]
    page = await world.ask("list", limit=2)
    assert [job.id for job in page.data] == [ids[2], ids[1]]
    assert page.has_more
    page = await world.ask("list", after=ids[1], limit=2)
    assert ([job.id for job in page.data], page.has_more) == ([ids[0]], False)


async def test_unknown_things_are_refused_in_openais_words(world: World) -> None:
    await world.trainer()
    await world.executor()
    await world.create()
    for verb in ("get", "cancel", "pause", "resume", "events", "checkpoints"):
        for job_id in ("ftjob-none", "no key *", ""):
            error = await refused(world.ask(verb, job_id))
            assert (error.status, error.code, error.param) == (404, "fine_tune_not_found", "fine_tuning_job_id")
    error = await refused(world.create(model="gpt"))
    assert (error.status, error.param, error.code) == (400, "model", "model_not_found")
    assert "base" in error.message
    error = await refused(world.create(training_file="file-none"))
    assert (error.status, error.param) == (400, "training_file")
    error = await refused(world.create(lora={"r": 8}))
    assert (error.status, error.param) == (400, "lora.r")
    error = await refused(world.create(validation_file="file-1"))
    assert (error.status, error.message) == (400, "validation_file is not supported yet")


async def test_without_executor_creation_is_to_be_retried(world: World) -> None:
    await world.trainer()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await world.create()


async def test_a_bad_file_fails_the_job_with_line_numbers(world: World) -> None:
    trainer = await world.trainer(max_sequence_length=64)
    await world.executor()
    await world.upload(example("fine") + b"{}\n" + example("long " * 20) + b"nonsense\n", "file-bad")
    job = await world.create(training_file="file-bad")
    failed = await world.until_status(job.id, "failed")
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert [part.split(":")[0] for part in failed.error.message.split("; ")] == ["line 2", "line 3", "line 4"]
    assert "the limit is 64" in failed.error.message
    last = (await world.ask("events", job.id)).data[0]
    assert (last.level, failed.error.message in last.message) == ("error", True)
    await trainer.idle()
    assert trainer.actor.vitals().counters["jobs_failed"] == 1


async def test_a_diverging_job_fails_with_the_executors_words(world: World) -> None:
    await world.trainer()
    executor = await world.executor()
    executor.fail_at = 2
    failed = await world.until_status((await world.create()).id, "failed")
    assert failed.error is not None
    assert failed.error.message == "the loss of step 2 is nan"


async def test_a_refused_job_fails_at_once(world: World) -> None:
    await world.trainer()
    executor = await world.executor()
    executor.refusal = Rejected(reason="invalid", message="rank too high")
    failed = await world.until_status((await world.create()).id, "failed")
    assert failed.error is not None
    assert (failed.error.message, executor.num_refused) == ("rank too high", 1)


async def test_an_executor_that_keeps_losing_the_job_fails_it(world: World) -> None:
    await world.trainer(max_attempts=3)
    executor = await world.executor()
    executor.refusal = Rejected(reason="not_found", message="no checkpoint")
    failed = await world.until_status((await world.create()).id, "failed")
    assert failed.error is not None
    assert "3 attempts" in failed.error.message
    assert executor.num_refused == 3


async def test_a_full_executor_is_asked_again(world: World) -> None:
    await world.trainer()
    executor = await world.executor()
    executor.refusal = Rejected(reason="overloaded", message="8 jobs are open", retry_after_ms=10)
    job = await world.create()
    await eventually(lambda: executor.num_refused >= 7)
    executor.refusal = None
    await world.until_status(job.id, "succeeded")


async def test_pause_writes_a_checkpoint_and_resume_goes_on_from_it(world: World, model_dir: Path) -> None:
    await world.trainer()
    executor = await world.executor(permits=4)
    job = await world.create(hyperparameters={"n_epochs": 3, "batch_size": 2})
    await world.until(job.id, lambda record: record.job.step == 4)
    assert (await world.ask("pause", job.id)).status == "running"
    await executor.allow(None)
    await world.until_status(job.id, "paused")
    step = (await world.ask("checkpoints", job.id)).data[0].step_number
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
    first, second = await world.create(), await world.create()
    await world.until_status(first.id, "running")
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
    first, second = await world.create(), await world.create()
    await world.until_status(first.id, "running")
    assert (await world.ask("cancel", second.id)).status == "cancelled"


async def test_more_jobs_than_slots_wait_in_order(world: World) -> None:
    trainer = await world.trainer(max_concurrent_jobs=2)
    executor = await world.executor(permits=0)
    created = [await world.create() for _ in range(3)]
    for job in created[:2]:
        await world.until_status(job.id, "running")
    await world.until_status(created[2].id, "queued")
    assert trainer.actor.vitals().gauges == {"jobs_running": 2, "jobs_queued": 1}
    await executor.allow(None)
    for job in created:
        await world.until_status(job.id, "succeeded")
    assert [order.job_id for order in executor.opened][2] == created[2].id


async def test_a_config_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_dir must be a folder with tokenizer\.json"):
        TrainerConfig(model_dir=tmp_path)
    with pytest.raises(ValueError, match="lease_s must be at least"):
        TrainerConfig(model_dir=write_model_dir(tmp_path), lease_s=1.0, renew_s=0.5)


async def test_the_process_joins_the_bus_and_stops_on_sigterm(nats_server: NatsServer, bus: Bus, model_dir: Path) -> None:
    environ = {
        **os.environ,
        "HEDDLE_NATS_URL": nats_server.url,
        "HEDDLE_MODEL_DIR": str(model_dir),
        "HEDDLE_HEARTBEAT_S": "0.05",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.trainer", env=environ, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    async with asyncio.timeout(30):
        log = b""
        while b"service.ready" not in log:
            line = await process.stderr.readline()
            assert line, log
            log += line
        answer = msgspec.json.decode((await bus.client.request("$SRV.PING", b"")).data)
        assert answer["name"] == "heddle-trainer"
        process.send_signal(signal.SIGTERM)
        log += await process.stderr.read()
        assert await process.wait() == 0
    assert b"service.stopped" in log
    assert b"Traceback" not in log


async def test_a_process_without_model_says_so(nats_server: NatsServer) -> None:
    environ = {**os.environ, "HEDDLE_NATS_URL": nats_server.url}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.trainer", env=environ, stderr=asyncio.subprocess.PIPE
    )
    _, log = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode != 0
    assert b"model_dir must be a folder with tokenizer.json" in log
