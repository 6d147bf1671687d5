"""The trainer against a fake executor on a real server: the life of a job and the API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from common import subjects
from common.bus import Bus, RemoteError
from common.chat import ChatTokenizer
from common.codec import decode
from common.messages import AdapterRecord, CreateJob, ErrorReply, FineTuningJob, Rejected
from tests.trainer_fakes import MODEL, example, write_model_dir
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
    assert 0 < validated["label_tokens"] < validated["tokens"]
    assert "trained_tokens" not in validated, "the job's field of that name counts all tokens of all epochs"
    assert f"{validated['tokens']} tokens per epoch, {validated['label_tokens']} of them are labels" in page.data[-2].message

    checkpoints = await world.ask("checkpoints", job.id)
    assert [c.step_number for c in checkpoints.data] == [6, 3]
    assert checkpoints.data[0].metrics["train_loss"] == pytest.approx(1 / 6)
    assert checkpoints.data[1].fine_tuned_model_checkpoint.endswith(":ckpt-step-3")
    first = await world.ask("checkpoints", job.id, limit=1)
    assert first.has_more
    rest = await world.ask("checkpoints", job.id, after=first.data[0].id)
    assert [c.step_number for c in rest.data] == [3]
    assert (await refused(world.ask("checkpoints", job.id, after="x"))).param == "after"


@pytest.mark.parametrize(("warmup_steps", "is_told"), [(5, False), (6, True)])
async def test_a_warm_up_as_long_as_the_job_is_warned_of(world: World, warmup_steps: int, is_told: bool) -> None:
    await world.trainer()
    await world.executor()
    job = await world.create(lora={"warmup_steps": warmup_steps})
    await world.until_status(job.id, "succeeded")
    warnings = [event.message for event in (await world.ask("events", job.id, limit=100)).data if event.level == "warn"]
    text = "warmup_steps=6, but the job has 6 steps: it never reaches its learning rate"
    assert warnings == ([text] if is_told else [])


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
    error = await refused(world.create(validation_file="file-none"))
    assert (error.status, error.param) == (400, "validation_file")


async def test_without_executor_creation_is_to_be_retried(world: World) -> None:
    await world.trainer()
    message = CreateJob(body={"model": MODEL, "training_file": "file-1"})
    assert (await refused(world.bus.request(subjects.finetune("create"), message, FineTuningJob))).status == 503


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
