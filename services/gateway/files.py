"""/v1/files: uploads in the JetStream object store. Knows files and their metadata, not what is in them."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from typing import IO, Annotated, Any, Literal
from urllib.parse import quote
from uuid import uuid4

from fastapi import APIRouter, Query, Request
from nats.js.api import ObjectInfo
from nats.js.errors import NotFoundError
from nats.js.object_store import ObjectStore
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import Response, StreamingResponse

from common import subjects
from common.bus import Bus
from common.files import file_meta, file_object
from services.gateway.errors import ApiError, bad_request, unavailable
from services.gateway.finetuning import Trainer
from services.gateway.http_errors import json_response

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
READ_TIMEOUT_S = 120.0
COPY_BYTES = 256 * 1024
SPOOL_BYTES = 1024 * 1024
"""Larger files go through a temporary file on disk, not through memory."""

_UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


class FileStore:
    """Uploads by id. `FileObject`s are dicts in OpenAI's shape."""

    def __init__(self, bus: Bus, max_file_bytes: int) -> None:
        self._bus = bus
        self._max_file_bytes = max_file_bytes

    async def create(self, upload: UploadFile, purpose: str) -> dict[str, Any]:
        """Store an upload. Raises ApiError 413."""
        if (upload.size or 0) > self._max_file_bytes:
            raise ApiError(413, f"A file may have at most {self._max_file_bytes} bytes.", param="file", code="file_too_large")
        file_id = f"file-{uuid4().hex}"
        meta = file_meta(file_id, upload.filename or "upload", purpose, time.time())
        source: Any = upload.file
        return file_object(await (await self._store()).put(file_id, source, meta))

    async def get(self, file_id: str) -> dict[str, Any]:
        """Raises ApiError 404."""
        return file_object(await self._info(await self._store(), file_id))

    async def delete(self, file_id: str) -> None:
        """Raises ApiError 404."""
        store = await self._store()
        await self._info(store, file_id)
        await store.delete(file_id)

    async def content(self, file_id: str) -> tuple[dict[str, Any], IO[bytes]]:
        """The file object and an open file with the content, at its beginning. Raises ApiError 404."""
        store = await self._store()
        record = file_object(await self._info(store, file_id))
        with contextlib.ExitStack() as on_error:
            spool: Any = on_error.enter_context(tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES))
            await self._read(store, file_id, spool)
            spool.seek(0)
            on_error.pop_all()
        return record, spool

    async def list(self, purpose: str | None, order: Literal["asc", "desc"]) -> list[dict[str, Any]]:
        """All files, or those of one purpose, by time of creation."""
        try:
            infos = await (await self._store()).list(ignore_deletes=True)
        except NotFoundError:
            return []
        records = [file_object(info) for info in infos if not info.deleted]
        chosen = [record for record in records if purpose in (None, record["purpose"])]
        return sorted(chosen, key=lambda record: (record["created_at"], record["id"]), reverse=order == "desc")

    async def _read(self, store: ObjectStore, file_id: str, sink: Any) -> None:
        """A file that is deleted meanwhile never ends, so there is a time limit."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                await store.get(file_id, writeinto=sink)
        except TimeoutError as error:
            raise unavailable("The file could not be read in time.", "file_timeout") from error

    async def _info(self, store: ObjectStore, file_id: str) -> ObjectInfo:
        try:
            return await store.get_info(file_id)
        except NotFoundError as error:
            raise ApiError(404, f"There is no file {file_id!r}.", code="file_not_found", param="file_id") from error

    async def _store(self) -> ObjectStore:
        return await self._bus.object_store(subjects.FILES_STORE)


def file_routes(files: FileStore, trainer: Trainer) -> APIRouter:
    """OpenAI's Files API."""
    router = APIRouter(prefix="/v1/files", tags=["Files"])

    @router.post("", summary="Upload a file", openapi_extra=_UPLOAD_SCHEMA)
    async def create(request: Request) -> Response:
        """Multipart form with `file` and `purpose`; finetuning reads chat JSONL of purpose `fine-tune`."""
        async with request.form(max_files=1, max_fields=16) as form:
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise bad_request("The form needs a part `file` with a file name.", "file")
            if purpose not in PURPOSES:
                raise bad_request(f"purpose must be one of {', '.join(PURPOSES)}.", "purpose")
            return json_response(await files.create(upload, str(purpose)))

    @router.get("", summary="List files")
    async def listing(
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """Newest first; `after` is the id of the last file already seen."""
        return json_response(page(await files.list(purpose, order), after, limit))

    @router.get("/{file_id}", summary="One file")
    async def get(file_id: str) -> Response:
        """Its metadata."""
        return json_response(await files.get(file_id))

    @router.get("/{file_id}/content", summary="A file's content")
    async def content(file_id: str) -> Response:
        """The bytes that were uploaded."""
        record, spool = await files.content(file_id)
        headers = {
            "content-length": str(record["bytes"]),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(record['filename'])}",
        }
        return StreamingResponse(_chunks(spool), headers=headers, media_type="application/octet-stream")

    @router.delete("/{file_id}", summary="Delete a file")
    async def delete(file_id: str) -> Response:
        """Refused with 409 while a job that has not ended trains on it: a job reads its file each time it starts or resumes.

        Without a trainer that could tell, the answer is 503.
        """
        await files.get(file_id)
        if (job_id := await trainer.user_of(file_id)) is not None:
            raise ApiError(409, f"The job {job_id} trains on this file; cancel it first.", code="file_in_use", param="file_id")
        await files.delete(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    return router


def page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """One page of a sorted list, after the item with that id. Raises ApiError 400 for an id that is not in the list."""
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad_request(f"There is nothing with the id {after!r}.", "after")
        start = ids.index(after) + 1
    data = items[start : start + limit]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": start + limit < len(items), **ends}


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while data := await run_in_threadpool(file.read, COPY_BYTES):
            yield data
