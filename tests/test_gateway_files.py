"""Files with the official client and a real object store."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import get_args

import openai
import pytest
from openai.types import FileObject

from common import subjects
from common.bus import Bus
from common.messages import FineTuningJob, JobPage, JobQuery, JobStatus
from tests.fakes import write_tiny_model
from tests.gateway_stage import Connect, staged

STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


async def start_trainer(bus: Bus, *jobs: tuple[str, JobStatus]) -> None:
    """A trainer with these jobs, (training file, status) each, newest first; it gives one job a page."""
    known = [
        FineTuningJob(
            id=f"ftjob-{place}",
            created_at=0,
            model="tiny",
            training_file=file_id,
            status=status,
            hyperparameters={},
            lora={},
            seed=0,
        )
        for place, (file_id, status) in enumerate(jobs)
    ]

    async def on_list(query: JobQuery) -> JobPage:
        start = 1 + [job.id for job in known].index(query.after) if query.after else 0
        return JobPage(data=tuple(known[start : start + 1]), has_more=start + 1 < len(known))

    await bus.subscribe(subjects.finetune("list"), JobQuery, on_list)
    await bus.flush()


async def test_a_file_that_a_job_needs_is_kept(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        files = {status: await stage.openai.files.create(file=("a", b"x"), purpose="fine-tune") for status in STATUSES}
        with pytest.raises(openai.InternalServerError) as untold:
            await stage.openai.files.delete(files["succeeded"].id)
        assert (untold.value.status_code, untold.value.code) == (503, "no_trainer")
        await start_trainer(stage.bus, *((file.id, status) for status, file in files.items()))
        ended = {"succeeded", "failed", "cancelled"}
        for place, (status, file) in enumerate(files.items()):
            if status in ended:
                assert (await stage.openai.files.delete(file.id)).deleted
                continue
            with pytest.raises(openai.ConflictError, match=f"ftjob-{place} ") as refused:
                await stage.openai.files.delete(file.id)
            assert (refused.value.code, refused.value.param) == ("file_in_use", "file_id")
        kept = {file.id for status, file in files.items() if status not in ended}
        assert {file.id async for file in stage.openai.files.list()} == kept


async def test_a_file_from_upload_to_deletion(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        await start_trainer(stage.bus)
        content = json.dumps({"messages": []}).encode() + b"\n"
        made = await stage.openai.files.create(file=("tr\u00e4in.jsonl", content), purpose="fine-tune")
        FileObject.model_validate(made.model_dump(), strict=True)
        assert (made.filename, made.bytes, made.purpose, made.status) == (
            "tr\u00e4in.jsonl",
            len(content),
            "fine-tune",
            "processed",
        )
        assert await stage.openai.files.retrieve(made.id) == made
        assert (await stage.openai.files.content(made.id)).read() == content
        assert [file.id async for file in stage.openai.files.list()] == [made.id]
        stored = await (await stage.bus.object_store(subjects.FILES_STORE)).get(made.id)
        assert stored.data == content, "the trainer reads the object by the file's id"
        assert (await stage.openai.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await stage.openai.files.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await stage.openai.files.content(made.id)
        with pytest.raises(openai.NotFoundError):
            await stage.openai.files.delete(made.id)
        assert [file.id async for file in stage.openai.files.list()] == []


async def test_a_file_larger_than_memory_buffers_and_an_empty_one(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        content = bytes(range(256)) * 12_000
        large = await stage.openai.files.create(file=("large.bin", content), purpose="user_data")
        empty = await stage.openai.files.create(file=("empty.bin", b""), purpose="user_data")
        assert (large.bytes, empty.bytes) == (len(content), 0)
        assert (await stage.openai.files.content(large.id)).read() == content
        assert (await stage.openai.files.content(empty.id)).read() == b""


async def test_lists_of_files_come_in_pages(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
        made = [await stage.openai.files.create(file=(f"{i}", b"x"), purpose="fine-tune") for i in range(3)]
        other = await stage.openai.files.create(file=("b", b"x"), purpose="batch")
        everything = {file.id for file in made} | {other.id}
        assert {file.id async for file in stage.openai.files.list(limit=1)} == everything
        assert {file.id async for file in stage.openai.files.list(purpose="fine-tune")} == {file.id for file in made}
        rising = [file.id async for file in stage.openai.files.list(order="asc", limit=2)]
        falling = [file.id async for file in stage.openai.files.list(order="desc", limit=3)]
        assert rising == falling[::-1]
        page = (await stage.http.get("/v1/files", params={"limit": 2})).json()
        assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", True, falling[0], falling[1])
        assert (await stage.http.get("/v1/files", params={"after": "file-nothing"})).status_code == 400
        assert (await stage.http.get("/v1/files", params={"limit": 0})).json()["error"]["param"] == "limit"


async def test_uploads_that_are_refused(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir, max_file_bytes=100_000) as stage:
        for form, files, param in (
            ({}, {"file": ("a", b"x")}, "purpose"),
            ({"purpose": "fun"}, {"file": ("a", b"x")}, "purpose"),
            ({"purpose": "fine-tune"}, {"other": ("a", b"x")}, "file"),
        ):
            response = await stage.http.post("/v1/files", data=form, files=files)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        for num_bytes in (100_001, 300_000):
            upload = {"file": ("a", io.BytesIO(b"x" * num_bytes))}
            response = await stage.http.post("/v1/files", data={"purpose": "fine-tune"}, files=upload)
            assert response.status_code == 413, num_bytes
        assert (await stage.http.post("/v1/files", content=b"no form")).status_code == 400
        assert [file async for file in stage.openai.files.list()] == []
