"""Files with the official client and a real object store."""

from __future__ import annotations

import io
import json
from pathlib import Path

import openai
import pytest
from openai.types import FileObject

from common import subjects
from tests.fakes import write_tiny_model
from tests.gateway_stage import Connect, staged

ADAPTER = "ft:tiny::looms:abc/1"
HYPERPARAMETERS = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.5}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


async def test_a_file_from_upload_to_deletion(connect: Connect, model_dir: Path) -> None:
    async with staged(connect, model_dir) as stage:
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
