"""Fine-tuning jobs and the adapters they make, with the official client; the trainer is a few lines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob as OpenAIJob
from openai.types.fine_tuning import FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from common import subjects
from common.bus import Bus
from common.codec import encode
from common.messages import (
    AdapterRecord,
    CheckpointPage,
    CreateJob,
    ErrorReply,
    EventPage,
    FineTuningJob,
    JobCheckpoint,
    JobError,
    JobEvent,
    JobPage,
    JobQuery,
    JobStatus,
    LoraSpec,
)
from tests.fakes import MODEL, SAID, write_tiny_model
from tests.gateway_stage import Connect, staged

ADAPTER = "ft:tiny::looms:abc/1"
HYPERPARAMETERS = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.5}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def models_are(*names: str) -> Callable[[Any], bool]:
    """Whether GET /v1/models lists these."""
    return lambda listing: [model["id"] for model in listing["data"]] == [*names]


def job(status: JobStatus = "running", **changes: Any) -> FineTuningJob:
    fields: dict[str, Any] = {
        "id": "ftjob-1",
        "created_at": 1_700_000_000,
        "model": MODEL,
        "training_file": "file-1",
        "status": status,
        "hyperparameters": HYPERPARAMETERS,
        "lora": {"rank": 8},
        "seed": 7,
        "step": 3,
        "total_steps": 9,
    }
    return FineTuningJob(**fields | changes)


async def start_trainer(bus: Bus) -> list[tuple[str, Any]]:
    """A trainer that knows one job; returns what it was asked, by verb."""
    asked: list[tuple[str, Any]] = []
    answers: dict[str, Any] = {
        "create": job("validating_files", suffix="looms", metadata={"a": "b"}),
        "list": JobPage(data=(job(), job("failed", error=JobError(code="bad_file", message="line 3"))), has_more=True),
        "get": job(
            "succeeded", fine_tuned_model=ADAPTER, trained_tokens=99, finished_at=1_700_000_100, result_files=("file-2",)
        ),
        "cancel": job("cancelled"),
        "pause": job("paused"),
        "resume": job("queued"),
        "events": EventPage(
            data=(
                JobEvent(id="e2", created_at=2, level="info", message="step", type="metrics", data={"train_loss": 0.5}),
                JobEvent(id="e1", created_at=1, level="info", message="started"),
            )
        ),
        "checkpoints": CheckpointPage(
            data=(
                JobCheckpoint(
                    id="ftckpt-1",
                    created_at=5,
                    fine_tuning_job_id="ftjob-1",
                    fine_tuned_model_checkpoint=f"{ADAPTER}:ckpt-step-4",
                    step_number=4,
                    metrics={"step": 4.0, "train_loss": 0.5},
                ),
            )
        ),
    }

    def handler(verb: str) -> Callable[[Any], Awaitable[Any]]:
        async def on_message(message: CreateJob | JobQuery) -> Any:
            asked.append((verb, message))
            if isinstance(message, JobQuery) and message.job_id == "ftjob-unknown":
                return ErrorReply(status=404, message="no such job", code="job_not_found", param="job_id")
            if isinstance(message, CreateJob) and "training_file" not in message.body:
                return ErrorReply(status=400, message="training_file is required", param="training_file")
            return answers[verb]

        return on_message

    for verb in answers:
        expected: Any = CreateJob if verb == "create" else JobQuery
        await bus.subscribe(subjects.finetune(verb), expected, handler(verb))
    await bus.flush()
    return asked


async def test_a_finetuning_job_with_the_official_client(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        asked = await start_trainer(stage.bus)
        jobs = stage.openai.fine_tuning.jobs
        made = await jobs.create(
            model=MODEL, training_file="file-1", hyperparameters={"n_epochs": 2}, extra_body={"lora": {"rank": 8}}
        )
        body = {"model": MODEL, "training_file": "file-1", "hyperparameters": {"n_epochs": 2}, "lora": {"rank": 8}}
        assert asked.pop() == ("create", CreateJob(body=body))
        OpenAIJob.model_validate_json(made.model_dump_json())
        assert (made.id, made.object, made.status, made.organization_id) == (
            "ftjob-1",
            "fine_tuning.job",
            "validating_files",
            "",
        )
        assert made.hyperparameters.n_epochs == 2
        assert made.method is not None
        assert made.method.supervised is not None
        assert made.method.supervised.hyperparameters is not None
        assert made.method.supervised.hyperparameters.batch_size == 4
        assert (made.metadata, made.result_files, made.error) == ({"a": "b"}, [], None)
        got = await jobs.retrieve("ftjob-1")
        assert (got.status, got.fine_tuned_model, got.trained_tokens, got.result_files) == (
            "succeeded",
            ADAPTER,
            99,
            ["file-2"],
        )
        extras = (await stage.http.get("/v1/fine_tuning/jobs/ftjob-1")).json()
        assert (extras["lora"], extras["step"], extras["total_steps"]) == ({"rank": 8}, 3, 9)
        assert (await jobs.cancel("ftjob-1")).status == "cancelled"
        assert str((await jobs.pause("ftjob-1")).status) == "paused"
        assert (await jobs.resume("ftjob-1")).status == "queued"


async def test_lists_of_jobs_events_and_checkpoints(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        asked = await start_trainer(stage.bus)
        jobs = stage.openai.fine_tuning.jobs
        page = await jobs.list(limit=2, after="ftjob-9")
        assert asked.pop() == ("list", JobQuery(after="ftjob-9", limit=2))
        assert page.has_more
        assert page.data[1].error is not None
        assert page.data[1].error.code == "bad_file"
        events = (await jobs.list_events("ftjob-1")).data
        assert asked.pop() == ("events", JobQuery(job_id="ftjob-1", limit=20))
        assert len((await jobs.list_events("ftjob-1", limit=1000)).data) == 2
        assert asked.pop() == ("events", JobQuery(job_id="ftjob-1", limit=100))
        assert (await stage.http.get("/v1/fine_tuning/jobs/ftjob-1/events", params={"limit": 1001})).status_code == 400
        for event in events:
            FineTuningJobEvent.model_validate(event.model_dump())
        assert (events[0].type, events[0].data, events[0].object) == ("metrics", {"train_loss": 0.5}, "fine_tuning.job.event")
        checkpoints = (await jobs.checkpoints.list("ftjob-1")).data
        assert asked.pop() == ("checkpoints", JobQuery(job_id="ftjob-1", limit=10))
        FineTuningJobCheckpoint.model_validate(checkpoints[0].model_dump())
        assert (checkpoints[0].step_number, checkpoints[0].metrics.train_loss) == (4, 0.5)


async def test_the_trainers_errors_reach_the_client(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        absent = await stage.http.get("/v1/fine_tuning/jobs")
        assert (absent.status_code, absent.json()["error"]["code"]) == (503, "no_trainer")
        await start_trainer(stage.bus)
        with pytest.raises(openai.NotFoundError) as unknown:
            await stage.openai.fine_tuning.jobs.retrieve("ftjob-unknown")
        assert (unknown.value.code, unknown.value.param) == ("job_not_found", "job_id")
        refused = await stage.http.post("/v1/fine_tuning/jobs", json={"model": MODEL})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "training_file")
        assert (await stage.http.post("/v1/fine_tuning/jobs", json=[1])).status_code == 400
        assert (await stage.http.post("/v1/fine_tuning/jobs/ftjob-1/explode")).status_code == 404
        assert (await stage.http.get("/v1/fine_tuning/jobs", params={"limit": 1000})).status_code == 400


async def test_adapters_are_models_while_they_are_known(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        foreign = AdapterRecord(name="foreign", base_model="another", artifact="a/2", lora=LoraSpec(), created_at=1.0)
        record = AdapterRecord(name=ADAPTER, base_model=MODEL, artifact="a/1", lora=LoraSpec(), created_at=1_700_000_000.5)
        bucket = await stage.bus.key_value(subjects.ADAPTERS_BUCKET)
        await bucket.put("broken", b"no record")
        await bucket.put("foreign", encode(foreign))
        await bucket.put("key", encode(record))
        await stage.until("/v1/models", models_are(MODEL, ADAPTER))
        model = await stage.openai.models.retrieve(ADAPTER)
        assert (model.id, model.created, model.object) == (ADAPTER, 1_700_000_000, "model")
        card = (await stage.http.get(f"/v1/models/{ADAPTER}")).json()
        assert (card["parent"], card["root"]) == (MODEL, "a/1")
        with pytest.raises(openai.NotFoundError):
            await stage.openai.completions.create(model="foreign", prompt="one")
        answer = await stage.openai.completions.create(model=ADAPTER, prompt="one", max_tokens=64)
        assert (answer.choices[0].text, answer.model) == (SAID, ADAPTER)
        assert (stage.executor.requests[0].model, stage.executor.requests[0].base_model) == (ADAPTER, MODEL)
        await bucket.delete("key")
        await stage.until("/v1/models", models_are(MODEL))
        with pytest.raises(openai.NotFoundError):
            await stage.openai.models.retrieve(ADAPTER)
